// Advice for large tensors that are about to be written for the first time. Not for per-instruction-set files.
#pragma once

#include <cstdint>

#include "common/tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace clk {

// Lets the system back the tensor's memory with pages of 2 MiB. Allocators hand tensors of tens of megabytes back to the system, and a
// fresh one then costs a fault per 4 KiB page at the first write: as much time as a kernel at memory bandwidth. Only whole large pages
// inside the tensor are concerned, so that it takes no more memory. Without effect where the system has none.
inline Tensor on_large_pages(Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * static_cast<uintptr_t>(tensor.element_size());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first + kPage) static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
  return tensor;
}

}  // namespace clk

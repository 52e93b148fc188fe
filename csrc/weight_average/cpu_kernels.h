// Declares the per-instruction-set functions; include with CLK_ISA defined once per namespace.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace clk {

enum class Storage : int { f32, f64, bf16, f16 };

#define CLK_DECLARE(ISA)                                                                                             \
  namespace ISA {                                                                                                    \
  void average_chunk(Storage dst_type, void* dst, Storage src_type, const void* src, int64_t n, double weight);      \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

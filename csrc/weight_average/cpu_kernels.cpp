// Compiled once per instruction set, see common/isa.h.
#include "weight_average/cpu_kernels.h"

namespace clk {
namespace CLK_ISA {
namespace {

template <typename Dst, typename Src>
void average(Dst* __restrict dst, const Src* __restrict src, int64_t n, double weight) {
  using C = compute_t<Dst>;
  const C w = static_cast<C>(weight);
  for (int64_t i = 0; i < n; ++i) {
    const C a = load(dst + i);
    store(dst + i, a + w * (static_cast<C>(load(src + i)) - a));
  }
}

template <typename Dst>
void average_into(Dst* dst, Storage src_type, const void* src, int64_t n, double weight) {
  switch (src_type) {
    case Storage::f32: return average(dst, static_cast<const float*>(src), n, weight);
    case Storage::f64: return average(dst, static_cast<const double*>(src), n, weight);
    case Storage::bf16: return average(dst, static_cast<const BFloat16*>(src), n, weight);
    case Storage::f16: return average(dst, static_cast<const Half*>(src), n, weight);
  }
}

}  // namespace

void average_chunk(Storage dst_type, void* dst, Storage src_type, const void* src, int64_t n, double weight) {
  switch (dst_type) {
    case Storage::f32: return average_into(static_cast<float*>(dst), src_type, src, n, weight);
    case Storage::f64: return average_into(static_cast<double*>(dst), src_type, src, n, weight);
    case Storage::bf16: return average_into(static_cast<BFloat16*>(dst), src_type, src, n, weight);
    case Storage::f16: return average_into(static_cast<Half*>(dst), src_type, src, n, weight);
  }
}

}  // namespace CLK_ISA
}  // namespace clk

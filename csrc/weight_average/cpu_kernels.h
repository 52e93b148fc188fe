// Declares the per-instruction-set functions; include with CLK_ISA defined once per namespace.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace clk {

enum class Storage : int { f32, f64, bf16, f16 };

static constexpr int64_t bytes_of(Storage type) { return type == Storage::f64 ? 8 : type == Storage::f32 ? 4 : 2; }

// What happens to every element; `stochastic` concerns averages stored in 16 bits.
struct AverageRule {
  double weight, other_weight;
  bool stochastic;
  uint64_t seed;
};

// A piece of one tensor: n elements of the average, its value and (unless null) the other value. `counter` is that of element 0.
struct AveragePiece {
  Storage dst_type, src_type, other_type;
  void* dst;
  const void* src;
  const void* other;
  int64_t n;
  uint64_t counter;
};

#define CLK_DECLARE(ISA)                                                        \
  namespace ISA {                                                               \
  void average_piece(const AveragePiece& piece, const AverageRule& rule);       \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

// What the per-instruction-set files of the distillation of both sides offer; no torch header gets into them.
#pragma once

#include <cstdint>

#include "distill_kl/cpu_kernels.h"

namespace clk {

// The gradients of a mean of losses, T² Σ −p_t log p_s each, in both logits. `logits` carries layout, temperature and statistics.
struct DistillationGradients {
  LogitsProblem logits;
  double factor;            // T grad / number of slices
  void *student, *teacher;  // [outer][M][inner] in the logits' dtype, or null where nobody asks
};

#define CLK_DECLARE(ISA)                                                                              \
  namespace ISA {                                                                                     \
  void distillation_gradients(const DistillationGradients& problem, int64_t begin, int64_t end);      \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

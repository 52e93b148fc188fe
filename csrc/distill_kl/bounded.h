// Distillation from features whose logits are bounded: what the per-instruction-set files offer. Pointers and sizes only.
//
// While |logits / T| stays below 63, no softmax needs its maximum: exp(z) is representable for all of them, sums from any number of
// tiles simply add up, and one exponential serves the rows and the columns. Logits outside the bound, NaN included, are noticed
// where they appear; the general kernels (feature_forward.h, feature_backward.h) take over then.
#pragma once

#include "distill_kl/cpu_kernels.h"

namespace clk {

// Largest |log2 exp(z)| of the bounded kernels: sums of 10^9 exponentials and their products with logits stay finite in fp32, and the
// reciprocal of the smallest exponential too.
constexpr double kLargestPower = 92;

// A logit that is masked must be this far below, in powers of two, to count as 0 beside every other.
constexpr double kMaskedPower = -160;

struct BoundedProblem {
  const FeatureProblem* features;
  const void* packed;    // rows as `bounded_pack` leaves them: [row block][(d + K d_t) * kBlockRows]
  void* kept;            // exponentials of the first `kept_columns` columns: [row block][kept_columns][1 + K][kBlockRows]
  int64_t kept_columns;  // kBlockColumns * n, or M
  bool weighted;         // weights other than 1
};

// Row blocks [first, last) by columns [m0, m1), m0 a multiple of kBlockColumns.
struct BoundedTask {
  int64_t first, last, m0, m1;
  void* scratch;
};

// Sums that a task adds to, of exponentials e in powers of two and y = log2 of the student's (target "kl": of the student's over the
// teacher's): rows [1 + 2K][N_padded] hold Σ e_s, then for each teacher Σ e_t, Σ e_t y; columns [1 + 3K][M] Σ e_s, then Σ e_t,
// Σ w e_t, Σ w e_t y.
struct BoundedSums {
  double *rows, *columns;
};

// The gradient with respect to the student's logits is e_s (rows[0][n] + columns[0][m]) − Σ_k e_tk (rows[1 + k][n] + w columns[1 + k][m]).
struct BoundedGradient {
  const void *row_factors, *column_factors;  // [1 + K][N_padded], zeros beyond N; [1 + K][M]; in the compute type
  void* rows;                                // [N][line] Σ_m g a_m, overwritten, or null
  void* columns;                             // [M][line] Σ_n g f_n, overwritten, or null
};

#define CLK_DECLARE(ISA)                                                                                             \
  namespace ISA {                                                                                                    \
  int64_t bounded_line(const FeatureProblem& problem);                                                               \
  int64_t bounded_scratch(const FeatureProblem& problem);                                                            \
  void bounded_pack(const FeatureProblem& problem, int64_t block, void* packed);                                     \
  bool bounded_sums(const BoundedProblem& problem, const BoundedTask& task, const BoundedSums& sums);                \
  bool bounded_gradient(const BoundedProblem& problem, const BoundedTask& task, const BoundedGradient& gradient);    \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

// What the per-instruction-set files of distillation offer; pointers and sizes only, so that no torch header gets into them.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace clk {

enum class Dtype : int { f32, f64, bf16, f16 };

// Logits of one side as (outer, M, inner) with strides in elements.
struct LogitsView {
  Dtype dtype;
  const void* data;
  int64_t outer, step, inner;
};

struct LogitsProblem {
  LogitsView student, teacher;
  bool f64;  // arithmetic, losses and statistics in fp64 instead of fp32
  bool kl;
  int64_t M, inner;     // inner == 1: step is 1; otherwise inner has unit stride
  double temperature;
  void* loss;           // [outer][inner]
  void* stats;          // [4][outer][inner]: maximum and log Σ exp(z - maximum) of the student, of the teacher
  int64_t slices;       // outer * inner
  const void* grad;     // [outer][inner], backward only
  void* grad_student;   // [outer][M][inner] in the student's dtype, backward only; may be where the student is
};

// Columns of the similarity matrix that are handled together: a multiple of every kTileRows, of a size that keeps the anchors of a
// tile in the second-level cache at d = 512.
constexpr int64_t kBlockColumns = 96;
// Rows that are handled together: a multiple of every panel width.
constexpr int64_t kBlockRows = 64;

// Running statistics of one softmax direction: [0] and [1] are maximum and sum of exponentials of the student; for teacher k, from
// 2 + 5k on: its maximum m_t and sum Σ e_t, the weighted sum Σ w e_t (columns only), Σ w e_t (z_s - m_s) and Σ w e_t (z_t - m_t),
// with e_t = exp(z_t - m_t), z = logits / temperature, and w = 1 for rows. One array of numbers per statistic.
constexpr int kStudentStats = 2;
constexpr int kTeacherStats = 5;

// Inner positions of logits that one unit of work takes.
constexpr int64_t kInnerBlock = 64;

struct FeatureProblem {
  Dtype dtype;
  const void *student, *teacher, *anchors, *teacher_anchors;  // [N][d], [K][N][d_t], [M][d], [M][d_t] or null if shared
  const void* weight;                                         // [K][N_padded], zeros beyond N, in the compute type
  int64_t N, N_padded, M, K, d, d_t;                          // N_padded: N up to a multiple of kBlockRows
  double scale;                                               // logit_scale / temperature
  double masked;                                              // logit of the diagonal, already divided by the temperature
  bool rows, columns, kl, mask_diagonal;
};

// One rectangle of the similarity matrix: rows [n0, n1) with n0 a multiple of kBlockRows, columns [m0, m1).
struct FeatureTask {
  int64_t n0, n1, m0, m1;
  void* rows;     // statistics [2 + 5K][N_padded] of this column group, zero sums and lowest maxima where nothing was seen
  void* columns;  // statistics [2 + 5K][M] of this row group
  void* scratch;
};

struct FeatureBackward {
  const void* row_stats;     // [1 + K][N_padded]: log-sum-exps of student and teachers
  const void* row_weight;    // [N_padded]: Σ_k w
  const void* column_stats;  // [2 + K][M]: log-sum-exp of the student, Σ_k Σ_n w p_t, log-sum-exps of the teachers
  double row_factor, column_factor;
  bool need_anchors, need_rows;  // need_rows: the sum over the columns, for the gradients of student and scale
};

#define CLK_DECLARE(ISA)                                                                                                   \
  namespace ISA {                                                                                                          \
  void distill_forward(const LogitsProblem& problem, int64_t begin, int64_t end);                                          \
  void distill_backward(const LogitsProblem& problem, int64_t begin, int64_t end);                                         \
  int64_t feature_padded(const FeatureProblem& problem, int64_t columns);                                                  \
  int64_t feature_scratch(const FeatureProblem& problem, int64_t rows, bool backward);                                     \
  void feature_forward(const FeatureProblem& problem, const FeatureTask& task);                                            \
  void feature_backward(const FeatureProblem& problem, const FeatureTask& task, const FeatureBackward& backward);          \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

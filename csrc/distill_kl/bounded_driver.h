// Distillation from features with bounded logits, on the host; see bounded.h.
#pragma once

#include "distill_kl/feature_inputs.h"

namespace clk {

// Factors of the two directions as in the loss; `temperature` as given.
struct FeatureFactors {
  double rows, columns, temperature;
};

// Each returns false, with nothing of use written, where the bounded kernels cannot tell: the general ones must then.
//
// Loss, and, in the compute type and where not null, the log-sum-exps (shapes in cl_kernels/schemas.py) and the gradient (N, d) with
// respect to logit_scale * student.
bool bounded_forward(const Inputs& in, const FeatureFactors& f, double* loss, void* row_stats, void* column_stats, void* gradient);

// Gradients with respect to logit_scale * student and logit_scale * anchors as sums of partial gradients [groups][rows][line].
struct PartialGradients {
  std::optional<Buffer> rows, columns;
  int64_t row_parts = 0, column_parts = 0, line = 0;
};
bool bounded_backward(const Inputs& in, const FeatureFactors& f, const void* row_stats, const void* column_stats, bool need_rows,
                      bool need_columns, PartialGradients& gradients);

}  // namespace clk

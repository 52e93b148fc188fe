// Distillation from features with bounded logits, on the host; see bounded.h.
#pragma once

#include "distill_kl/feature_inputs.h"

namespace clk {

// Factors of the two directions as in the loss; `temperature` as given.
struct FeatureFactors {
  double rows, columns, temperature;
};

// Gradients with respect to logit_scale * student and logit_scale * anchors as sums of partial gradients [parts][rows][line].
struct PartialGradients {
  bool need_rows, need_columns;
  std::optional<Buffer> rows{}, columns{};
  int64_t row_parts = 0, column_parts = 0, line = 0;
};

// Both return false, with nothing of use written, where the bounded kernels cannot tell: the general ones must then.
//
// The loss and the gradients that are needed or, where none is, the log-sum-exps (shapes in cl_kernels/schemas.py) in the compute type.
bool bounded_forward(const Inputs& in, const FeatureFactors& f, double* loss, void* row_stats, void* column_stats,
                     PartialGradients& gradients);
bool bounded_backward(const Inputs& in, const FeatureFactors& f, const void* row_stats, const void* column_stats,
                      PartialGradients& gradients);

}  // namespace clk

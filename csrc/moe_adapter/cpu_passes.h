// Forward and backward pass on the CPU, for the operations that wrap them.
#pragma once

#include <optional>
#include <tuple>

#include "moe_adapter/cpu_driver.h"
#include "moe_adapter/cpu_gradients.h"

namespace clk {
namespace moe {

struct Experts {
  PerExpert down_weight, down_bias, up_weight, up_bias;  // (R, D), (R), (D, R), (D)
};

// Those that are not needed have zero elements.
struct Gradients {
  Tensor x, gates;
  ExpertTensors experts;
};

// Output and bottleneck. With add_input the output is [residual + x] + Σ …, in one pass; it needs a residual then.
std::tuple<Tensor, Tensor> run_forward(const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const Experts& experts,
                                       const std::optional<Tensor>& residual, bool add_input, const std::optional<Tensor>& seed,
                                       double scale, double dropout_p, bool save_hidden);

// With add_grad the incoming gradient itself is a part of that of x.
Gradients run_backward(const Tensor& grad, const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& down_weight,
                       const PerExpert& up_weight, const PerExpert& up_bias, const Tensor& hidden, bool add_grad, double scale,
                       double dropout_p, bool need_x, bool need_gates, bool need_experts);

}  // namespace moe
}  // namespace clk

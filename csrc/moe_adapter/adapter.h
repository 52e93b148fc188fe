#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace clk {

// See cl_kernels/schemas.py for shapes and meaning.
std::tuple<Tensor, Tensor> moe_adapter_cpu(Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor down_bias,
                                           Tensor up_weight, Tensor up_bias, std::optional<Tensor> residual,
                                           std::optional<Tensor> seed, double scale, double dropout_p, bool save_hidden);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_adapter_backward_cpu(
    Tensor grad, Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor up_weight, Tensor up_bias, Tensor hidden,
    double scale, double dropout_p, bool need_x, bool need_gates, bool need_experts);

}  // namespace clk

#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/tensor.h"

namespace clk {

// See cl_kernels/schemas.py for shapes and meaning.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_block_cpu(
    Tensor x, Tensor residual, Tensor w_gate, Tensor w_noise, Tensor noise, std::vector<Tensor> down_weight, std::vector<Tensor> down_bias,
    std::vector<Tensor> up_weight, std::vector<Tensor> up_bias, std::optional<Tensor> seed, int64_t k, double scale, double dropout_p,
    bool save_hidden);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routed_block_backward_cpu(
    Tensor grad, Tensor x, Tensor w_gate, Tensor w_noise, Tensor noise, Tensor gates, Tensor expert_ids, std::vector<Tensor> down_weight,
    std::vector<Tensor> up_weight, std::vector<Tensor> up_bias, Tensor hidden, double scale, double dropout_p, bool need_x,
    bool need_router, bool need_experts);

}  // namespace clk

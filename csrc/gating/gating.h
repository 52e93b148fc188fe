#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace clk {

// x (B, D), w_gate and w_noise (D, E), noise (B, E) -> gates (B, k), expert_ids (B, k) int64, usage (E) int64.
std::tuple<Tensor, Tensor, Tensor> top_k_gating_cpu(Tensor x, Tensor w_gate, std::optional<Tensor> w_noise,
                                                    std::optional<Tensor> noise, int64_t k);

}  // namespace clk

// Gradient of noisy top-k gating on the CPU.
#pragma once

#include <optional>

#include "common/tensor.h"

namespace clk {
namespace moe {

// What a forward pass of the gating took and gave: logits ℓ = x w_gate + noise ⊙ (softplus(x w_noise) + 0.01), whose k largest of a row
// are kept. All of one type, float32 or float64; ids within [0, E).
struct Router {
  Tensor x, w_gate, w_noise, noise;  // (B, D), (D, E), (D, E), (B, E)
  Tensor gates, expert_ids;          // (B, k), (B, k) int64
};

// Adds the gradient of x to `token` (B, D), if given; writes those of the two weights, (D, E) and contiguous, if given. `grad` (B, k).
void add_router_gradients(const Router& router, const Tensor& grad, const std::optional<Tensor>& token, const Tensor* grad_gate,
                          const Tensor* grad_noise);

}  // namespace moe
}  // namespace clk

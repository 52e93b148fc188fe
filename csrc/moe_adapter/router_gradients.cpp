// Only the k kept logits of a row have a gradient, so everything is k scaled additions of rows of D numbers, where the products over all
// experts would be E / k times as many. Weights are turned to (E, D) for that. Sums go over the rows in order.
#include "moe_adapter/router_gradients.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace clk {
namespace moe {
namespace {

template <typename C>
std::vector<C> transposed(const C* from, int64_t rows, int64_t columns) {
  std::vector<C> to(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[static_cast<size_t>(j * rows + i)] = from[i * columns + j];
  }
  return to;
}

template <typename C>
void add_scaled(C factor, const C* row, int64_t n, C* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * row[i];
}

template <typename C>
C dot(const C* a, const C* b, int64_t n) {
  constexpr int64_t kSums = 16;  // in parallel
  C sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t u = 0; u < kSums; ++u) sums[u] += a[i + u] * b[i + u];
  }
  C total = 0;
  for (C sum : sums) total += sum;
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// The derivative of softplus, which is linear above 20.
template <typename C>
C sigmoid(C v) {
  return v > C(20) ? C(1) : C(1) / (C(1) + std::exp(-v));
}

template <typename C>
void add(const Router& router, const Tensor& grad, const std::optional<Tensor>& token, const Tensor* grad_gate, const Tensor* grad_noise) {
  const int64_t rows = router.x.size(0), width = router.x.size(1), experts = router.w_gate.size(1), k = router.gates.size(1);
  const Tensor inputs = router.x.stride(1) == 1 ? router.x : torch::stable::contiguous(router.x);
  const std::vector<C> gate = transposed(data<C>(torch::stable::contiguous(router.w_gate)), width, experts);
  const std::vector<C> spread = transposed(data<C>(torch::stable::contiguous(router.w_noise)), width, experts);
  const Tensor noise = torch::stable::contiguous(router.noise);
  std::vector<C> gate_sums(grad_gate ? gate.size() : 0), noise_sums(grad_noise ? gate.size() : 0);
  for (int64_t b = 0; b < rows; ++b) {
    const C* x = data<C>(inputs) + b * inputs.stride(0);
    const C *g = data<C>(router.gates) + b * k, *upstream = data<C>(grad) + b * k;
    C along = 0;  // the gradient of a softmax: g ⊙ (upstream − ⟨g, upstream⟩)
    for (int64_t j = 0; j < k; ++j) along += g[j] * upstream[j];
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = data<int64_t>(router.expert_ids)[b * k + j], row = e * width;
      const C logit = g[j] * (upstream[j] - along);
      const C width_of_noise = logit * data<C>(noise)[b * experts + e] * sigmoid(dot(x, spread.data() + row, width));
      if (token.has_value()) {
        C* to = data<C>(*token) + b * token->stride(0);
        add_scaled(logit, gate.data() + row, width, to);
        add_scaled(width_of_noise, spread.data() + row, width, to);
      }
      if (grad_gate) add_scaled(logit, x, width, gate_sums.data() + row);
      if (grad_noise) add_scaled(width_of_noise, x, width, noise_sums.data() + row);
    }
  }
  for (const auto& [sums, result] : {std::pair(&gate_sums, grad_gate), std::pair(&noise_sums, grad_noise)}) {
    if (result == nullptr) continue;
    const std::vector<C> found = transposed(sums->data(), experts, width);
    std::copy(found.begin(), found.end(), data<C>(*result));
  }
}

}  // namespace

void add_router_gradients(const Router& router, const Tensor& grad, const std::optional<Tensor>& token, const Tensor* grad_gate,
                          const Tensor* grad_noise) {
  STD_TORCH_CHECK(!token.has_value() || token->stride(1) == 1, "router gradients: expected the gradient's rows contiguous");
  if (router.x.scalar_type() == ScalarType::Double) {
    add<double>(router, grad, token, grad_gate, grad_noise);
  } else {
    add<float>(router, grad, token, grad_gate, grad_noise);
  }
}

}  // namespace moe
}  // namespace clk

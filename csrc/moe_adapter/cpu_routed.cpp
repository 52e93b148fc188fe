// The adapted half of a residual block on the CPU, as one operation each way: x + residual + the mixture that each sample's token 0
// chooses. Experts come as tensors of their own, so that nothing has to be stacked; sums that autograd would form in passes over
// tensors as large as x are formed while the kernels write.
#include "moe_adapter/routed.h"

#include "gating/gating.h"
#include "moe_adapter/cpu_passes.h"
#include "moe_adapter/router_gradients.h"

namespace clk {
namespace {

void check_router(const Tensor& x, const Tensor& w_gate, const Tensor& w_noise, const Tensor& noise, int64_t experts) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "routed_block: x must be float32 or float64");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "routed_block: expected x (B, L, D) with at least one token");
  for (const Tensor* weight : {&w_gate, &w_noise}) {
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == x.size(2) && weight->size(1) == experts && weight->scalar_type() == type,
                    "routed_block: expected w_gate and w_noise (D, E) with the dtype of x");
  }
  STD_TORCH_CHECK(noise.dim() == 2 && noise.size(0) == x.size(0) && noise.size(1) == experts && noise.scalar_type() == type,
                  "routed_block: expected noise (B, E) with the dtype of x");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> routed_block_cpu(
    Tensor x, Tensor residual, Tensor w_gate, Tensor w_noise, Tensor noise, std::vector<Tensor> down_weight, std::vector<Tensor> down_bias,
    std::vector<Tensor> up_weight, std::vector<Tensor> up_bias, std::optional<Tensor> seed, int64_t k, double scale, double dropout_p,
    bool save_hidden) {
  using moe::PerExpert;
  const moe::Experts experts{PerExpert(down_weight), PerExpert(down_bias), PerExpert(up_weight), PerExpert(up_bias)};
  check_router(x, w_gate, w_noise, noise, experts.down_weight.experts());
  const auto [gates, ids, usage] = top_k_gating_cpu(torch::stable::select(x, 1, 0), w_gate, w_noise, noise, k);
  const auto [out, hidden] = moe::run_forward(x, ids, gates, experts, residual, true, seed, scale, dropout_p, save_hidden);
  return {out, usage, gates, ids, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routed_block_backward_cpu(
    Tensor grad, Tensor x, Tensor w_gate, Tensor w_noise, Tensor noise, Tensor gates, Tensor expert_ids, std::vector<Tensor> down_weight,
    std::vector<Tensor> up_weight, std::vector<Tensor> up_bias, Tensor hidden, double scale, double dropout_p, bool need_x,
    bool need_router, bool need_experts) {
  using moe::PerExpert;
  const PerExpert down(down_weight), up(up_weight), bias(up_bias);
  check_router(x, w_gate, w_noise, noise, down.experts());
  moe::Gradients found =
      moe::run_backward(grad, x, expert_ids, gates, down, up, bias, hidden, true, scale, dropout_p, need_x, need_x || need_router, need_experts);
  const auto empty = [&](bool needed) {
    return needed ? torch::stable::new_empty(w_gate, {w_gate.size(0), w_gate.size(1)}) : torch::stable::new_empty(w_gate, {0});
  };
  Tensor grad_gate = empty(need_router), grad_noise = empty(need_router);
  if (need_x || need_router) {
    const moe::Router router{torch::stable::select(x, 1, 0), w_gate, w_noise, noise, gates, expert_ids};
    std::optional<Tensor> token;
    if (need_x) token = torch::stable::select(found.x, 1, 0);
    moe::add_router_gradients(router, found.gates, token, need_router ? &grad_gate : nullptr, need_router ? &grad_noise : nullptr);
  }
  const moe::ExpertTensors& experts = found.experts;
  return {found.x, grad_gate, grad_noise, experts.down_weight, experts.down_bias, experts.up_weight, experts.up_bias};
}

}  // namespace clk

// Backward pass of the adapters on the CPU, piece of the batch by piece. First over tiles of tokens: the gradient of the bottleneck,
// from it the gate gradient (one term per token, added up in order) and the gradient of x. Then over experts: their weight gradients,
// each from the tokens that chose it, in order. A piece is so small that the second half finds its tokens in cache. No sum depends on
// the number of threads.
#include <algorithm>

#include "moe_adapter/adapter.h"
#include "moe_adapter/cpu_passes.h"
#include "moe_adapter/cpu_tiles.h"

namespace clk {
namespace moe {
namespace {

constexpr int64_t kPieceBytes = 4 << 20;  // of tokens and gradients

// grad_gates (B, k) = Σ over tokens of gate_terms (B, k, L).
template <typename C>
void add_gate_terms(const Tensor& terms, const Tensor& grad_gates, int64_t length) {
  const C* from = data<C>(terms);
  C* to = data<C>(grad_gates);
  for (int64_t i = 0; i < grad_gates.numel(); ++i) {
    C sum = 0;
    for (int64_t l = 0; l < length; ++l) sum += from[i * length + l];
    to[i] = sum;
  }
}

}  // namespace

Gradients run_backward(const Tensor& grad, const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& down_weight,
                       const PerExpert& up_weight, const PerExpert& up_bias, const Tensor& hidden, bool add_grad, double scale,
                       double dropout_p, bool need_x, bool need_gates, bool need_experts) {
  const Shape s = check_arguments(x, expert_ids, gates, down_weight, up_weight, up_bias);
  check_like(grad, x, "the incoming gradient");
  STD_TORCH_CHECK(hidden.numel() == s.batch * s.slots * s.length * s.rank && hidden.scalar_type() == x.scalar_type() && hidden.is_contiguous(),
                  "moe_adapter_backward: hidden must be contiguous (B, k, L, R) with the dtype of x");
  const auto empty = [&](bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) {
    return wanted ? torch::stable::new_empty(x, sizes, type) : torch::stable::new_empty(x, {0}, type);
  };
  const ScalarType type = x.scalar_type();
  Tensor grad_x = need_x ? empty_rows(x) : torch::stable::new_empty(x, {0});
  Tensor grad_gates = empty(need_gates, {s.batch, s.slots}, compute_type(x));
  ExpertTensors experts{empty(need_experts, {s.experts, s.rank, s.width}, type), empty(need_experts, {s.experts, s.rank}, type),
                    empty(need_experts, {s.experts, s.width, s.rank}, type), empty(need_experts, {s.experts, s.width}, type)};

  const Tensor ids = torch::stable::contiguous(expert_ids), g = torch::stable::contiguous(gates);
  const Tensor rows = unit_stride(x), upstream = unit_stride(grad);
  const Usage usage(s, data<int64_t>(ids));
  const PackedWeights packed_up(up_weight, usage, false), packed_down(down_weight, usage, false);
  const Tiles tiles(s, data<int64_t>(ids));

  Backward op{};
  fill(op, s, rows, ids, g, up_bias, scale, dropout_p);
  op.narrow = packed_up.weights();
  op.widen = packed_down.weights();
  op.grad = view_of(upstream);
  op.add_grad = add_grad;
  op.hidden = hidden.data_ptr();
  if (need_x) op.grad_x = view_of(grad_x);
  std::optional<Tensor> sums, gate_terms, grad_pre;
  if (need_gates) {
    gate_terms = torch::stable::new_empty(x, {s.batch, s.slots, s.length}, compute_type(x));
    op.gate_terms = gate_terms->data_ptr();
  }
  std::vector<Piece> pieces = tiles.passes();
  std::optional<ExpertSums> sums_of_experts;
  if (need_experts) {
    const int64_t row = 2 * s.width * static_cast<int64_t>(x.element_size());
    pieces = tiles.pieces(kPieceBytes / std::max<int64_t>(1, row));
    int64_t most = 0;
    for (const Piece& piece : pieces) most = std::max(most, tiles.bottleneck_rows(piece));
    grad_pre = torch::stable::new_empty(x, {most, s.rank}, compute_type(x));
    op.grad_pre = grad_pre->data_ptr();
    sums_of_experts.emplace(op, usage, experts);
  }
  if (need_x && tiles.revisits() && x.element_size() == 2) {
    sums = torch::stable::new_empty(x, {s.batch, s.length, s.width}, ScalarType::Float);
    op.sums = sums->data_ptr();
  }
  for (const Piece& piece : pieces) {
    op.first_row = tiles.first_row(piece);
    tiles.for_each(op, piece, [&](const Tile& tile, void* scratch) { CLK_CALL(backward_tile, op, tile, scratch); });
    if (need_experts) sums_of_experts->add(op, view_of(rows), tiles.choices(piece));
  }
  if (need_experts) sums_of_experts->finish();
  if (need_gates && type == ScalarType::Double) {
    add_gate_terms<double>(*gate_terms, grad_gates, s.length);
  } else if (need_gates) {
    add_gate_terms<float>(*gate_terms, grad_gates, s.length);
  }
  return {grad_x, grad_gates, experts};
}

}  // namespace moe

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_adapter_backward_cpu(
    Tensor grad, Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor up_weight, Tensor up_bias, Tensor hidden,
    double scale, double dropout_p, bool need_x, bool need_gates, bool need_experts) {
  using moe::PerExpert;
  const moe::Gradients found = moe::run_backward(grad, x, expert_ids, gates, PerExpert(down_weight), PerExpert(up_weight), PerExpert(up_bias),
                                                 hidden, false, scale, dropout_p, need_x, need_gates, need_experts);
  const moe::ExpertTensors& experts = found.experts;
  return {found.x, found.gates, experts.down_weight, experts.down_bias, experts.up_weight, experts.up_bias};
}

}  // namespace clk

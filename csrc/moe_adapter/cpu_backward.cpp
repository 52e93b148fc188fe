// Backward pass of the adapters on the CPU. First over tiles of tokens: the gradient of the bottleneck, from it the gate gradient
// (one term per token, added up in order) and the gradient of x. Then over experts: their weight gradients, each from the tokens
// that chose it, in order. No sum depends on the number of threads.
#include <algorithm>
#include <cstring>

#include "moe_adapter/adapter.h"
#include "moe_adapter/cpu_driver.h"

namespace clk {
namespace {

using namespace moe;

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

struct Gradients {
  Tensor down_weight, down_bias, up_weight, up_bias;
};

void expert_gradients(const Problem& problem, const Pairs& pairs, const Tensor& x, const Tensor& grad, const Tensor& hidden,
                      const Tensor& grad_pre, Gradients& out) {
  std::vector<int64_t> used;
  for (int64_t e = 0; e < problem.experts; ++e) {
    if (pairs.count(e) > 0) {
      used.push_back(e);
    } else {
      for (const Tensor* t : {&out.down_weight, &out.down_bias, &out.up_weight, &out.up_bias}) {
        const size_t bytes = static_cast<size_t>(t->numel() / problem.experts) * t->element_size();
        std::memset(data<char>(*t) + static_cast<size_t>(e) * bytes, 0, bytes);
      }
    }
  }
  // Narrow tasks read the bottleneck again and again; with few experts they are what keeps all threads busy. No sum depends on it.
  const int64_t tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t columns = CLK_CALL(gradient_columns, problem.type, problem.width, static_cast<int64_t>(used.size()), tasks);
  const int64_t blocks = (problem.width + columns - 1) / columns;
  const int64_t bytes = CLK_CALL(gradient_scratch, problem);
  torch::stable::parallel_for(0, static_cast<int64_t>(used.size()) * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes) + 64]);
    char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (int64_t i = begin; i < end; ++i) {
      ExpertGradients op{};
      static_cast<Problem&>(op) = problem;
      op.expert = used[static_cast<size_t>(i / blocks)];
      op.count = pairs.count(op.expert);
      op.pairs = pairs.pairs.data() + pairs.begin[static_cast<size_t>(op.expert)];
      op.x = view_of(x);
      op.grad = view_of(grad);
      op.hidden = hidden.data_ptr();
      op.grad_pre = grad_pre.data_ptr();
      op.down_weight = out.down_weight.data_ptr();
      op.down_bias = out.down_bias.data_ptr();
      op.up_weight = out.up_weight.data_ptr();
      op.up_bias = out.up_bias.data_ptr();
      const int64_t first = i % blocks * columns;
      CLK_CALL(gradient_block, op, first, std::min(columns, problem.width - first), scratch);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_adapter_backward_cpu(
    Tensor grad, Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor up_weight, Tensor up_bias, Tensor hidden,
    double scale, double dropout_p, bool need_x, bool need_gates, bool need_experts) {
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
  Gradients experts{empty(need_experts, {s.experts, s.rank, s.width}, type), empty(need_experts, {s.experts, s.rank}, type),
                    empty(need_experts, {s.experts, s.width, s.rank}, type), empty(need_experts, {s.experts, s.width}, type)};

  const Tensor ids = torch::stable::contiguous(expert_ids), g = torch::stable::contiguous(gates);
  const Tensor down = torch::stable::contiguous(down_weight), up = torch::stable::contiguous(up_weight);
  const Tensor b_up = torch::stable::contiguous(up_bias);
  const Tensor rows = unit_stride(x), upstream = unit_stride(grad);
  const Pairs pairs(s, data<int64_t>(ids));
  const PackedWeights packed_up(up, pairs, false), packed_down(down, pairs, false);
  const Tiles tiles(s, data<int64_t>(ids));

  Backward op{};
  fill(op, s, rows, ids, g, b_up, scale, dropout_p);
  op.narrow = packed_up.weights();
  op.widen = packed_down.weights();
  op.grad = view_of(upstream);
  op.hidden = hidden.data_ptr();
  if (need_x) op.grad_x = view_of(grad_x);
  std::optional<Tensor> sums, gate_terms, grad_pre;
  if (need_gates) {
    gate_terms = torch::stable::new_empty(x, {s.batch, s.slots, s.length}, compute_type(x));
    op.gate_terms = gate_terms->data_ptr();
  }
  if (need_experts) {
    grad_pre = torch::stable::new_empty(x, {s.batch, s.slots, s.length, s.rank}, compute_type(x));
    op.grad_pre = grad_pre->data_ptr();
  }
  if (need_x && tiles.revisits() && x.element_size() == 2) {
    sums = torch::stable::new_empty(x, {s.batch, s.length, s.width}, ScalarType::Float);
    op.sums = sums->data_ptr();
  }
  tiles.for_each(op, [&](const Tile& tile, void* scratch) { CLK_CALL(backward_tile, op, tile, scratch); });
  if (need_gates && type == ScalarType::Double) {
    add_gate_terms<double>(*gate_terms, grad_gates, s.length);
  } else if (need_gates) {
    add_gate_terms<float>(*gate_terms, grad_gates, s.length);
  }
  if (need_experts) expert_gradients(op, pairs, rows, upstream, hidden, *grad_pre, experts);
  return {grad_x, grad_gates, experts.down_weight, experts.down_bias, experts.up_weight, experts.up_bias};
}

}  // namespace clk

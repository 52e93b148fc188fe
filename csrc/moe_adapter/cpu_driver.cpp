#include "moe_adapter/cpu_driver.h"

#include <algorithm>

#include "common/large_pages.h"

namespace clk {
namespace moe {
namespace {

constexpr int64_t kWorthPacking = 128;  // rows of an expert, on average

}  // namespace

PerExpert::PerExpert(const Tensor& stack) : held_{torch::stable::contiguous(stack)}, type_(stack.scalar_type()) {
  STD_TORCH_CHECK(stack.dim() >= 1, "moe_adapter: expected stacked weights (E, …)");
  for (int64_t i = 1; i < stack.dim(); ++i) sizes_.push_back(stack.size(i));
  const int64_t experts = stack.size(0), stride = experts > 0 ? stack.numel() / experts * static_cast<int64_t>(stack.element_size()) : 0;
  for (int64_t e = 0; e < experts; ++e) data_.push_back(clk::data<char>(held_[0]) + e * stride);
}

PerExpert::PerExpert(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "moe_adapter: expected the weights of at least one expert");
  type_ = tensors[0].scalar_type();
  for (int64_t i = 0; i < tensors[0].dim(); ++i) sizes_.push_back(tensors[0].size(i));
  held_.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    bool same = tensor.dim() == dim() && tensor.scalar_type() == type_;
    for (int64_t i = 0; same && i < dim(); ++i) same = tensor.size(i) == size(i);
    STD_TORCH_CHECK(same, "moe_adapter: expected the same shape and dtype of every expert");
    held_.push_back(torch::stable::contiguous(tensor));
    data_.push_back(held_.back().data_ptr());
  }
}

Shape check_arguments(const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& down_weight,
                      const PerExpert& up_weight, const PerExpert& up_bias) {
  STD_TORCH_CHECK(x.dim() == 3 && expert_ids.dim() == 2 && gates.dim() == 2 && down_weight.dim() == 2,
                  "moe_adapter: expected x and down_weight with 3 dimensions, expert_ids and gates with 2");
  const Shape s{x.size(0), x.size(1), x.size(2), down_weight.size(0), down_weight.experts(), expert_ids.size(1)};
  STD_TORCH_CHECK(expert_ids.size(0) == s.batch && gates.size(0) == s.batch && gates.size(1) == s.slots,
                  "moe_adapter: sizes do not fit x (B, L, D), expert_ids and gates (B, k)");
  STD_TORCH_CHECK(expert_ids.scalar_type() == ScalarType::Long, "moe_adapter: expert_ids must be int64");
  STD_TORCH_CHECK(gates.scalar_type() == compute_type(x), "moe_adapter: gates must be float32, or float64 for float64 x");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(down_weight.is(type, s.rank, s.width) && up_weight.is(type, s.width, s.rank) && up_bias.is(type, s.width) &&
                      up_weight.experts() == s.experts && up_bias.experts() == s.experts,
                  "moe_adapter: expected down_weight (E, R, D), up_weight (E, D, R) and up_bias (E, D) with the D and the dtype of x");
  return s;
}

void check_like(const Tensor& tensor, const Tensor& expected, const char* name) {
  bool same = tensor.dim() == expected.dim() && tensor.scalar_type() == expected.scalar_type();
  for (int64_t i = 0; same && i < expected.dim(); ++i) same = tensor.size(i) == expected.size(i);
  STD_TORCH_CHECK(same, "moe_adapter: ", name, " must have the shape and dtype of x");
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::Double: return Element::f64;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: STD_TORCH_CHECK(false, "moe_adapter: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor unit_stride(const Tensor& tensor) { return tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor); }

View view_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

Tensor empty_rows(const Tensor& x) {
  if (!x.is_contiguous() && torch::stable::transpose(x, 0, 1).is_contiguous()) {
    return torch::stable::transpose(on_large_pages(torch::stable::new_empty(x, {x.size(1), x.size(0), x.size(2)})), 0, 1);
  }
  return on_large_pages(torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}));
}

void fill(Problem& p, const Shape& s, const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& up_bias,
          double scale, double dropout_p) {
  p.type = element_of(x.scalar_type());
  p.length = s.length;
  p.width = s.width;
  p.rank = s.rank;
  p.experts = s.experts;
  p.slots = s.slots;
  p.expert_ids = data<int64_t>(expert_ids);
  p.gates = gates.data_ptr();
  p.up_bias = up_bias.data();
  p.scale = scale;
  p.dropout_p = dropout_p;
  p.sums = nullptr;
}

Usage::Usage(const Shape& s, const int64_t* ids) : rows(static_cast<size_t>(s.experts) + 1) {
  for (int64_t i = 0; i < s.batch * s.slots; ++i) rows[static_cast<size_t>(known_expert(s.experts, ids[i]))] += s.length;
  rows.pop_back();
  for (int64_t e = 0; e < s.experts; ++e) {
    if (rows[static_cast<size_t>(e)] > 0) experts.push_back(e);
    total += rows[static_cast<size_t>(e)];
  }
}

PackedWeights::PackedWeights(const PerExpert& weight, const Usage& usage, bool transposed, const PerExpert* bias)
    : experts_(static_cast<size_t>(weight.experts()), nullptr) {
  const Element type = element_of(weight.scalar_type());
  // Transposed: stored (n, K); otherwise (K, n).
  const int64_t K = weight.size(transposed ? 1 : 0), n = weight.size(transposed ? 0 : 1), rows = K + (bias ? 1 : 0);
  const int64_t width = CLK_CALL(panel_columns, type, n);
  const std::vector<int64_t>& used = usage.experts;
  const bool fits = !transposed && !bias && n % width == 0 && (type == Element::f32 || type == Element::f64);
  const bool in_place = fits && usage.total < kWorthPacking * static_cast<int64_t>(used.size());
  const int64_t bytes = (CLK_CALL(packed_bytes, type, rows, n) + 63) / 64 * 64;
  step_ = in_place ? width : rows * width;
  ld_ = in_place ? n : width;
  if (in_place) {
    for (int64_t e : used) experts_[static_cast<size_t>(e)] = weight.data()[e];
    return;
  }
  memory_.reset(new char[used.size() * static_cast<size_t>(bytes) + 64]);
  char* base = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64);
  torch::stable::parallel_for(0, static_cast<int64_t>(used.size()), 1 + (1 << 16) / (K * n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = used[static_cast<size_t>(i)];
      CLK_CALL(pack_weight, type, weight.data()[e], K, n, transposed ? 1 : n, transposed ? K : 1, bias ? bias->data()[e] : nullptr,
               base + i * bytes);
      experts_[static_cast<size_t>(e)] = base + i * bytes;
    }
  });
}

}  // namespace moe
}  // namespace clk

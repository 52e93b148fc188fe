// Top-k gating on the CPU: logits, noise, selection and softmax of a row in one pass, rows shared among the threads.
#include "gating/gating.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "common/isa.h"
#include "gating/cpu_kernels.h"

namespace clk {
namespace {

constexpr int64_t kWorkPerThread = 1 << 16;  // multiplications below which another thread costs more than it brings

// Appends the panels of weight (D, E), see GatingProblem.
template <typename C>
void pack(const Tensor& weight, int64_t panels, C* packed) {
  const int64_t width = weight.size(0), experts = weight.size(1);
  const C* source = data<C>(weight);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t columns = std::min(kPanel, experts - panel * kPanel);
    for (int64_t d = 0; d < width; ++d) {
      C* target = packed + (panel * width + d) * kPanel;
      std::copy_n(source + d * experts + panel * kPanel, columns, target);
      std::fill(target + columns, target + kPanel, C(0));
    }
  }
}

template <typename C>
void route(const Tensor& x, const Tensor& w_gate, const std::optional<Tensor>& w_noise, const std::optional<Tensor>& noise,
           int64_t k, const Tensor& gates, const Tensor& expert_ids) {
  const int64_t rows = x.size(0), width = x.size(1), experts = w_gate.size(1);
  const bool noisy = w_noise.has_value() && noise.has_value();
  const int64_t panels = (experts + kPanel - 1) / kPanel;
  std::vector<C> packed(static_cast<size_t>((noisy ? 2 : 1) * panels * width * kPanel));
  pack(w_gate, panels, packed.data());
  if (noisy) pack(*w_noise, panels, packed.data() + panels * width * kPanel);
  const GatingProblem<C> problem{data<C>(x), x.stride(0), packed.data(), noisy ? data<C>(*noise) : nullptr, width, experts,
                                 panels, k, data<C>(gates), data<int64_t>(expert_ids)};
  const int64_t groups = (rows + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, kRows * width * panels * kPanel));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<C> logits(static_cast<size_t>(kRows * 2 * panels * kPanel));
    std::vector<uint8_t> taken(static_cast<size_t>(experts));
    CLK_CALL(gate_rows, problem, begin * kRows, std::min(end * kRows, rows), logits.data(), taken.data());
  });
}

// In the type of the arithmetic, with unit stride along the last dimension.
Tensor prepared(const Tensor& tensor, ScalarType compute) {
  const Tensor converted = tensor.scalar_type() == compute ? tensor : torch::stable::to(tensor, compute);
  return converted.stride(1) == 1 ? converted : torch::stable::contiguous(converted);
}

std::optional<Tensor> prepared_whole(const std::optional<Tensor>& tensor, ScalarType compute) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(prepared(*tensor, compute));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> top_k_gating_cpu(Tensor x, Tensor w_gate, std::optional<Tensor> w_noise,
                                                    std::optional<Tensor> noise, int64_t k) {
  STD_TORCH_CHECK(x.dim() == 2 && w_gate.dim() == 2 && x.size(1) == w_gate.size(0), "top_k_gating: expected x (B, D), w_gate (D, E)");
  const int64_t rows = x.size(0), experts = w_gate.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= experts, "top_k_gating: expected 1 <= k <= E");
  STD_TORCH_CHECK(!noise.has_value() || (w_noise.has_value() && noise->dim() == 2 && noise->size(0) == rows && noise->size(1) == experts),
                  "top_k_gating: expected noise (B, E) with w_noise");
  STD_TORCH_CHECK(!w_noise.has_value() || (w_noise->dim() == 2 && w_noise->size(0) == x.size(1) && w_noise->size(1) == experts),
                  "top_k_gating: expected w_noise (D, E)");
  const bool wide = x.scalar_type() == ScalarType::Double;
  const ScalarType compute = wide ? ScalarType::Double : ScalarType::Float;
  Tensor gates = torch::stable::new_empty(x, {rows, k}, compute);
  Tensor expert_ids = torch::stable::new_empty(x, {rows, k}, ScalarType::Long);
  Tensor usage = torch::stable::new_zeros(x, {experts}, ScalarType::Long);
  if (rows > 0) {
    const Tensor input = prepared(x, compute);
    const Tensor gate = torch::stable::contiguous(prepared(w_gate, compute));
    const auto spread = prepared_whole(w_noise, compute), drawn = prepared_whole(noise, compute);
    if (wide) {
      route<double>(input, gate, spread, drawn, k, gates, expert_ids);
    } else {
      route<float>(input, gate, spread, drawn, k, gates, expert_ids);
    }
    int64_t* counts = data<int64_t>(usage);
    const int64_t* chosen = data<int64_t>(expert_ids);
    for (int64_t i = 0; i < rows * k; ++i) ++counts[chosen[i]];
  }
  return {gates, expert_ids, usage};
}

}  // namespace clk

// Forward pass of the adapters on the CPU: one pass over x, the bottleneck of a tile stays in cache, the residual is added while
// the result is written.
#include "common/large_pages.h"
#include "moe_adapter/adapter.h"
#include "moe_adapter/cpu_passes.h"
#include "moe_adapter/cpu_tiles.h"

namespace clk {
namespace moe {

std::tuple<Tensor, Tensor> run_forward(const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const Experts& experts,
                                       const std::optional<Tensor>& residual, bool add_input, const std::optional<Tensor>& seed,
                                       double scale, double dropout_p, bool save_hidden) {
  const Shape s = check_arguments(x, expert_ids, gates, experts.down_weight, experts.up_weight, experts.up_bias);
  STD_TORCH_CHECK(experts.down_bias.experts() == s.experts && experts.down_bias.is(x.scalar_type(), s.rank),
                  "moe_adapter: down_bias must be (E, R) with the dtype of x");
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "moe_adapter: dropout_p must be in [0, 1)");
  STD_TORCH_CHECK(dropout_p == 0 || (seed.has_value() && (seed->numel() == 1 || seed->numel() == 2) && seed->is_contiguous() &&
                                     seed->scalar_type() == ScalarType::Long),
                  "moe_adapter: dropout needs an int64 seed, or a seed and the number of the first sample");
  if (residual.has_value()) check_like(*residual, x, "residual");

  Tensor out = empty_rows(x);
  Tensor hidden = save_hidden ? on_large_pages(torch::stable::new_empty(x, {s.batch, s.slots, s.length, s.rank}))
                              : torch::stable::new_empty(x, {0});
  if (out.numel() == 0) return {out, hidden};

  const Tensor ids = torch::stable::contiguous(expert_ids), g = torch::stable::contiguous(gates);
  const Tensor rows = unit_stride(x);
  std::optional<Tensor> base;
  if (residual.has_value()) base = unit_stride(*residual);

  const Usage usage(s, data<int64_t>(ids));
  const PackedWeights packed_down(experts.down_weight, usage, true), packed_up(experts.up_weight, usage, true, &experts.up_bias);
  const Tiles tiles(s, data<int64_t>(ids));
  Forward op{};
  fill(op, s, rows, ids, g, experts.up_bias, scale, dropout_p);
  op.narrow = packed_down.weights();
  op.widen = packed_up.weights();
  op.x = view_of(rows);
  op.out = view_of(out);
  if (base.has_value()) op.residual = view_of(*base);
  op.add_input = add_input;
  op.down_bias = experts.down_bias.data();
  op.hidden = save_hidden ? hidden.data_ptr() : nullptr;
  if (dropout_p > 0) {
    const int64_t* numbers = data<int64_t>(*seed);
    op.seed = static_cast<uint64_t>(numbers[0]);
    op.first_row = seed->numel() == 2 ? numbers[1] * s.slots * s.length : 0;
  }
  std::optional<Tensor> sums;
  if (tiles.revisits() && x.element_size() == 2) {
    sums = torch::stable::new_empty(x, {s.batch, s.length, s.width}, ScalarType::Float);
    op.sums = sums->data_ptr();
  }
  for (const Piece& pass : tiles.passes()) {
    tiles.for_each(op, pass, [&](const Tile& tile, void* scratch) { CLK_CALL(forward_tile, op, tile, scratch); });
  }
  return {out, hidden};
}

}  // namespace moe

std::tuple<Tensor, Tensor> moe_adapter_cpu(Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor down_bias,
                                           Tensor up_weight, Tensor up_bias, std::optional<Tensor> residual,
                                           std::optional<Tensor> seed, double scale, double dropout_p, bool save_hidden) {
  using moe::PerExpert;
  const moe::Experts experts{PerExpert(down_weight), PerExpert(down_bias), PerExpert(up_weight), PerExpert(up_bias)};
  return moe::run_forward(x, expert_ids, gates, experts, residual, false, seed, scale, dropout_p, save_hidden);
}

}  // namespace clk

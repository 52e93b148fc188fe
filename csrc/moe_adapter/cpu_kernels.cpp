// The arithmetic of the adapters on the CPU. Compiled once per instruction set, see common/isa.h.
#include "moe_adapter/cpu_kernels.h"

#include "moe_adapter/gradient_kernels.h"
#include "moe_adapter/tile_kernels.h"

namespace clk {
namespace moe {
namespace CLK_ISA {
namespace {

// Calls BODY with T bound to the storage type.
#define CLK_ELEMENT(TYPE, T, ...)                                   \
  switch (TYPE) {                                                   \
    case Element::f32: { using T = float; return __VA_ARGS__; }     \
    case Element::f64: { using T = double; return __VA_ARGS__; }    \
    case Element::bf16: { using T = BFloat16; return __VA_ARGS__; } \
    case Element::f16: { using T = Half; return __VA_ARGS__; }      \
  }                                                                 \
  __builtin_unreachable()

template <typename C, template <typename> class Pieces>
int64_t measure(const Problem& problem) {
  Arena arena{nullptr};
  const Pieces<C> pieces(arena, problem);
  return arena.used;
}

}  // namespace

int64_t tile_rows() { return kTileRows; }

int64_t panel_columns(Element type, int64_t n) { CLK_ELEMENT(type, T, panel_width<compute_t<T>>(n)); }

int64_t packed_bytes(Element type, int64_t K, int64_t n) {
  CLK_ELEMENT(type, T, K * padded<compute_t<T>>(n) * static_cast<int64_t>(sizeof(compute_t<T>)));
}

void pack_weight(Element type, const void* source, int64_t K, int64_t n, int64_t row, int64_t column, const void* last, void* packed) {
  CLK_ELEMENT(type, T, pack(static_cast<const T*>(source), K, n, row, column, static_cast<compute_t<T>*>(packed), static_cast<const T*>(last)));
}

int64_t tile_scratch(const Problem& problem) {
  return problem.type == Element::f64 ? measure<double, Scratch>(problem) : measure<float, Scratch>(problem);
}

int64_t gradient_columns(Element type, int64_t width, int64_t threads) {
  const int64_t panel = type == Element::f64 ? panel_width<double>(width) : panel_width<float>(width);
  const int64_t panels = (width + panel - 1) / panel;
  const int64_t fewest = (width + kGradientColumns - 1) / kGradientColumns;
  const int64_t blocks = (fewest + threads - 1) / threads * threads;
  return (panels + blocks - 1) / blocks * panel;
}

int64_t gradient_scratch(const Problem& problem) {
  return problem.type == Element::f64 ? measure<double, GradientScratch>(problem) : measure<float, GradientScratch>(problem);
}

void forward_tile(const Forward& op, const Tile& tile, void* scratch) { CLK_ELEMENT(op.type, T, forward<T>(op, tile, scratch)); }

void backward_tile(const Backward& op, const Tile& tile, void* scratch) { CLK_ELEMENT(op.type, T, backward<T>(op, tile, scratch)); }

void gradient_block(const ExpertGradients& op, int64_t first_column, int64_t columns, void* scratch) {
  CLK_ELEMENT(op.type, T, gradient<T>(op, first_column, columns, scratch));
}

void store_numbers(Element type, const void* from, int64_t n, void* to) {
  CLK_ELEMENT(type, T, convert(static_cast<const compute_t<T>*>(from), n, static_cast<T*>(to)));
}

}  // namespace CLK_ISA
}  // namespace moe
}  // namespace clk

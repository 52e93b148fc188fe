// What the drivers (cpu_forward.cpp, cpu_backward.cpp) and the per-instruction-set kernels (cpu_kernels.cpp) share.
//
// "Compute type" is the type of arithmetic: float for 16-bit storage, else the storage type itself.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace clk {
namespace moe {

enum class Element : int { f32, f64, bf16, f16 };

// A (B, L, D) tensor with unit stride along D; null where there is none.
struct View {
  void* data = nullptr;
  int64_t sample_stride = 0, token_stride = 0;
};

// The weights of every expert as the right-hand side B (K, n) of products: panel p of expert e starts at experts[e] + p · step, its rows
// lie ld apart. Null where nobody chose the expert.
struct Weights {
  const void* const* experts;
  int64_t step, ld;
};

struct Problem {
  Element type;
  int64_t length, width, rank, experts, slots;  // L, D, R, E, k
  const int64_t* expert_ids;                    // (B, k)
  const void* gates;                            // (B, k), compute type
  double scale, dropout_p;
  Weights narrow, widen;                        // from D to R, and from R to D, forward with up_bias as one row more; compute type
  const void* const* up_bias;     // (D) of every expert
  void* sums;                     // (B L, D) compute type, holds 16-bit results between slots; or null
};

struct Forward : Problem {
  View x, residual, out;
  bool add_input;                 // whether x itself is added too, to the residual first
  const void* const* down_bias;   // (R) of every expert
  void* hidden;           // (B, k, L, R) or null
  uint64_t seed;
  int64_t first_row;  // of dropout's counters: that of sample 0 in the batch that this one is a part of
};

struct Backward : Problem {
  View grad, grad_x;
  bool add_grad;       // whether grad itself is a part of grad_x, as it is where x was added to the output
  const void* hidden;  // (B, k, L, R)
  void* gate_terms;    // (B, k, L) compute type, one term of the gate gradient per token; or null
  void* grad_pre;      // (…, R) compute type, gradient before the ReLU of one piece of the batch; or null
  int64_t first_row;   // where the piece starts in (B, k, L), which is grad_pre's order too; or the `first` of its first gathered tile
};

// Rows that are handled together: consecutive tokens of one sample; or, with `gathered`, linear token indices b L + l. All have the same
// experts in the slots from first_slot to end_slot, gathered ones in any order of the slots; they contribute together.
struct Tile {
  int64_t rows;
  int64_t sample, first;
  const int64_t* gathered;
  int64_t first_slot, end_slot;
  bool opens, closes;  // whether this is the first, the last contribution to these rows
  int64_t following;   // gathered rows of the next tile, whose indices come after those of this one
};

namespace {  // compiled for every instruction set

// An expert's number, or E for one that does not exist.
[[maybe_unused]] inline int64_t known_expert(int64_t experts, int64_t id) { return id >= 0 && id < experts ? id : experts; }

// The slots from first_slot to end_slot, `step` apart in `slots`: as they are, or of gathered rows by their experts' numbers.
[[maybe_unused]] inline void order_slots(int64_t experts, const int64_t* ids, const Tile& t, int64_t* slots, int64_t step) {
  for (int64_t j = t.first_slot; j < t.end_slot; ++j) {
    int64_t at = j - t.first_slot;
    for (; t.gathered && at > 0; --at) {
      const int64_t before = slots[(at - 1) * step];
      if (known_expert(experts, ids[before]) <= known_expert(experts, ids[j])) break;
      slots[at * step] = before;
    }
    slots[at * step] = j;
  }
}

// The row of grad_pre that belongs to row i of a gathered tile and the a-th of its experts.
[[maybe_unused]] inline int64_t gathered_row(const Tile& t, int64_t first_row, int64_t i, int64_t a) {
  return (t.first + i - first_row) * (t.end_slot - t.first_slot) + a;
}

}  // namespace

// The gradients of one expert's weights from runs of rows that chose it, in their order; added to what earlier ones left.
struct ExpertGradients : Problem {
  View x, grad;
  const void* hidden;    // (B, k, L, R)
  const void* grad_pre;  // (…, R) compute type
  int64_t run, count;    // rows in a run, which are tokens of one sample that follow each other, and how many runs
  const int64_t *rows, *grad_pre_rows;  // (count): where they start in (B, k, L), and in grad_pre
  bool first;            // whether no row of this expert came before
  void *down_weight, *down_bias, *up_weight, *up_bias;  // (R, D), (R), (D, R), (D), compute type
};

#define CLK_DECLARE(ISA)                                                                                               \
  namespace ISA {                                                                                                      \
  int64_t tile_rows();                                                                                                 \
  int64_t panel_columns(Element type, int64_t n);                                                                      \
  int64_t packed_bytes(Element type, int64_t K, int64_t n);                                                            \
  void pack_weight(Element type, const void* source, int64_t K, int64_t n, int64_t row, int64_t column,                \
                   const void* last, void* packed);                                                                    \
  int64_t tile_scratch(const Problem& problem);                                                                        \
  void forward_tile(const Forward& op, const Tile& tile, void* scratch);                                               \
  void backward_tile(const Backward& op, const Tile& tile, void* scratch);                                             \
  /* Columns of D per task: as many tasks as threads, or a multiple of that, unless they became too narrow. */         \
  int64_t gradient_columns(Element type, int64_t width, int64_t threads);                                              \
  int64_t gradient_scratch(const Problem& problem);                                                                    \
  void gradient_block(const ExpertGradients& op, int64_t first_column, int64_t columns, void* scratch);                \
  void store_numbers(Element type, const void* from, int64_t n, void* to); /* compute type to storage type */           \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace moe
}  // namespace clk

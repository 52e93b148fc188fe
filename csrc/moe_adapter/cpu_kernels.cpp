// The arithmetic of the adapters on the CPU. Compiled once per instruction set, see common/isa.h.
#include "moe_adapter/cpu_kernels.h"

#include "common/gemm.h"
#include "common/philox.h"
#include "common/scalar.h"

namespace clk {
namespace moe {
namespace CLK_ISA {
namespace {

constexpr int64_t kGradientRows = 128;  // tokens per step of the weight gradients
constexpr int kGradientPanels = 4;      // panels of columns per task of the weight gradients

// Hands out aligned pieces of the caller's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    char* piece = base + used;
    used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

template <typename C>
struct Scratch {
  C* rows;       // (kTileRows, D): the tile in compute type, where it cannot be read in place
  C* hidden;     // (k, kTileRows, R padded)
  C* panel;      // (kTileRows, panel width)
  C* factor;     // (R)
  C* weight;     // (k, kTileRows): gate · scale
  int64_t* slot;    // (k)
  int64_t* expert;  // (k)

  Scratch(Arena& arena, const Problem& p)
      : rows(arena.take<C>(kTileRows * p.width)),
        hidden(arena.take<C>(p.slots * kTileRows * padded<C>(p.rank))),
        panel(arena.take<C>(kTileRows * panel_width<C>(p.width))),
        factor(arena.take<C>(p.rank)),
        weight(arena.take<C>(p.slots * kTileRows)),
        slot(arena.take<int64_t>(p.slots)),
        expert(arena.take<int64_t>(p.slots)) {}
};

// Sample and token of every row of a tile.
struct Rows {
  int64_t n, sample[kTileRows], token[kTileRows];

  Rows(const Problem& p, const Tile& t) : n(t.rows) {
    for (int64_t i = 0; i < n; ++i) {
      sample[i] = t.gathered ? t.gathered[i] / p.length : t.sample;
      token[i] = t.gathered ? t.gathered[i] % p.length : t.first + i;
    }
  }

  template <typename T>
  T* in(const View& view, int64_t i) const {
    return static_cast<T*>(view.data) + sample[i] * view.sample_stride + token[i] * view.token_stride;
  }

  // Linear index of (sample, slot, token) in (B, k, L).
  int64_t index(const Problem& p, int64_t i, int64_t slot) const {
    return (sample[i] * p.slots + slot) * p.length + token[i];
  }
};

template <typename C>
struct Matrix {
  const C* data;
  int64_t ld;
};

// The rows of a tile in compute type: read in place where they are evenly spaced, copied into `buffer` otherwise.
template <typename T, typename C>
Matrix<C> compute_rows(const View& view, const Tile& t, const Rows& rows, int64_t width, C* buffer) {
  if constexpr (sizeof(T) == sizeof(C)) {
    if (!t.gathered) return {rows.in<const T>(view, 0), view.token_stride};
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* source = rows.in<const T>(view, i);
    for (int64_t d = 0; d < width; ++d) buffer[i * width + d] = static_cast<C>(load(source + d));
  }
  return {buffer, width};
}

template <typename C>
void multiply(int64_t rows, Matrix<C> a, const C* packed, int64_t K, int64_t n, C* c, int64_t ldc) {
  const int64_t width = panel_width<C>(n);
  for (int64_t start = 0; start < n; start += width) {
    multiply_panel<C>(static_cast<int>(rows), a.data, a.ld, packed + start * K, width, K, width, c + start, ldc, false);
  }
}

// Σ a·b with sixteen running sums, added up in a fixed order.
template <typename C, typename T>
C dot(const C* a, const T* b, int64_t n) {
  C lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int u = 0; u < 16; ++u) lanes[u] += a[i + u] * static_cast<C>(load(b + i + u));
  }
  for (int u = 0; i < n; ++i, ++u) lanes[u] += a[i] * static_cast<C>(load(b + i));
  C total = 0;
  for (int u = 0; u < 16; ++u) total += lanes[u];
  return total;
}

// out rows (+)= Σ_s hidden_s · packed_out[expert_s], plus what belongs to the rows: earlier slots, or the residual, and biases.
template <typename T, typename C>
void write_rows(const Problem& p, const Tile& t, const Rows& rows, const Scratch<C>& s, int64_t active, const View& residual,
                const View& out, const T* bias) {
  const int64_t width = panel_width<C>(p.width), ldh = padded<C>(p.rank);
  C* sums = static_cast<C*>(p.sums);
  for (int64_t start = 0; start < p.width; start += width) {
    const int64_t columns = p.width - start < width ? p.width - start : width;
    for (int64_t a = 0; a < active; ++a) {
      multiply_panel<C>(static_cast<int>(rows.n), s.hidden + a * kTileRows * ldh, ldh,
                        static_cast<const C*>(p.packed_out[s.expert[a]]) + start * p.rank, width, p.rank, width, s.panel, width,
                        a > 0);
    }
    if (active == 0) {
      for (int64_t i = 0; i < rows.n * width; ++i) s.panel[i] = C(0);
    }
    for (int64_t i = 0; i < rows.n; ++i) {
      C* line = s.panel + i * width;
      T* target = rows.in<T>(out, i) + start;
      C* sum = sums ? sums + (rows.sample[i] * p.length + rows.token[i]) * p.width + start : nullptr;
      if (bias) {
        for (int64_t a = 0; a < active; ++a) {
          const C w = s.weight[a * kTileRows + i];
          const T* b = bias + s.expert[a] * p.width + start;
          for (int64_t j = 0; j < columns; ++j) line[j] += w * static_cast<C>(load(b + j));
        }
      }
      if (t.opens && residual.data) {
        const T* r = rows.in<const T>(residual, i) + start;
        for (int64_t j = 0; j < columns; ++j) line[j] += static_cast<C>(load(r + j));
      } else if (!t.opens && sum) {
        for (int64_t j = 0; j < columns; ++j) line[j] += sum[j];
      } else if (!t.opens) {
        for (int64_t j = 0; j < columns; ++j) line[j] += static_cast<C>(load(target + j));
      }
      if (sum && !t.closes) {
        for (int64_t j = 0; j < columns; ++j) sum[j] = line[j];
      } else {
        for (int64_t j = 0; j < columns; ++j) store(target + j, line[j]);
      }
    }
  }
}

template <typename Body>
void for_each_slot(const Problem& p, const Tile& t, Body body) {
  const int64_t begin = t.gathered ? t.slot : 0, end = t.gathered ? t.slot + 1 : p.slots;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t e = t.gathered ? t.expert : p.expert_ids[t.sample * p.slots + j];
    body(j, e, e >= 0 && e < p.experts);
  }
}

template <typename T>
void forward(const Forward& op, const Tile& t, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<C> s(arena, op);
  const Rows rows(op, t);
  const Matrix<C> x = compute_rows<T, C>(op.x, t, rows, op.width, s.rows);
  const int64_t ldh = padded<C>(op.rank);
  const C* gates = static_cast<const C*>(op.gates);
  T* hidden = static_cast<T*>(op.hidden);
  const C grown = static_cast<C>(1.0 / (1.0 - op.dropout_p));
  const float p = static_cast<float>(op.dropout_p);
  int64_t active = 0;
  for_each_slot(op, t, [&](int64_t j, int64_t e, bool valid) {
    if (!valid) {
      for (int64_t i = 0; hidden && i < rows.n; ++i) {
        T* saved = hidden + rows.index(op, i, j) * op.rank;
        for (int64_t r = 0; r < op.rank; ++r) store(saved + r, C(0));
      }
      return;
    }
    C* h = s.hidden + active * kTileRows * ldh;
    multiply<C>(rows.n, x, static_cast<const C*>(op.packed_in[e]), op.width, op.rank, h, ldh);
    const T* bias = static_cast<const T*>(op.down_bias) + e * op.rank;
    for (int64_t i = 0; i < rows.n; ++i) {
      C* line = h + i * ldh;
      const int64_t offset = rows.index(op, i, j) * op.rank;
      const C weight = gates[rows.sample[i] * op.slots + j] * static_cast<C>(op.scale);
      for (int64_t r = 0; r < op.rank; ++r) {
        const C value = line[r] + static_cast<C>(load(bias + r));
        line[r] = value < C(0) ? C(0) : value;  // NaN passes
      }
      if (op.dropout_p > 0) {
        const int64_t counter = rows.index(op, i, j) * ((op.rank + 3) / 4);
        dropout_factors(op.seed, static_cast<uint64_t>(counter), p, grown, op.rank, s.factor);
        for (int64_t r = 0; r < op.rank; ++r) line[r] *= s.factor[r];
      }
      if (hidden) {
        for (int64_t r = 0; r < op.rank; ++r) store(hidden + offset + r, line[r]);
      }
      for (int64_t r = 0; r < op.rank; ++r) line[r] *= weight;
      s.weight[active * kTileRows + i] = weight;
    }
    s.expert[active++] = e;
  });
  write_rows<T, C>(op, t, rows, s, active, op.residual, op.out, static_cast<const T*>(op.up_bias));
}

template <typename T>
void backward(const Backward& op, const Tile& t, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<C> s(arena, op);
  const Rows rows(op, t);
  const Matrix<C> grad = compute_rows<T, C>(op.grad, t, rows, op.width, s.rows);
  const int64_t ldh = padded<C>(op.rank);
  const C* gates = static_cast<const C*>(op.gates);
  C* gate_terms = static_cast<C*>(op.gate_terms);
  C* grad_pre = static_cast<C*>(op.grad_pre);
  const C scale = static_cast<C>(op.scale), grown = static_cast<C>(1.0 / (1.0 - op.dropout_p));
  int64_t active = 0;
  for_each_slot(op, t, [&](int64_t j, int64_t e, bool valid) {
    if (!valid) {
      for (int64_t i = 0; gate_terms && i < rows.n; ++i) gate_terms[rows.index(op, i, j)] = C(0);
      return;
    }
    C* g = s.hidden + active * kTileRows * ldh;
    multiply<C>(rows.n, grad, static_cast<const C*>(op.packed_in[e]), op.width, op.rank, g, ldh);
    for (int64_t i = 0; i < rows.n; ++i) {
      C* line = g + i * ldh;
      const int64_t index = rows.index(op, i, j);
      const T* h = static_cast<const T*>(op.hidden) + index * op.rank;
      if (gate_terms) {
        const T* bias = static_cast<const T*>(op.up_bias) + e * op.width;
        gate_terms[index] = scale * (dot(line, h, op.rank) + dot(grad.data + i * grad.ld, bias, op.width));
      }
      const C factor = gates[rows.sample[i] * op.slots + j] * scale * grown;
      for (int64_t r = 0; r < op.rank; ++r) line[r] = load(h + r) <= C(0) ? C(0) : factor * line[r];
      if (grad_pre) {
        for (int64_t r = 0; r < op.rank; ++r) grad_pre[index * op.rank + r] = line[r];
      }
    }
    s.expert[active++] = e;
  });
  if (op.grad_x.data) write_rows<T, C>(op, t, rows, s, active, View{}, op.grad_x, nullptr);
}

template <typename C>
struct GradientScratch {
  int64_t width = panel_width<C>(2 * Vector<C>::width), columns = kGradientPanels * width;
  C *x, *grad;               // (kGradientRows, columns): tokens, and upstream gradients times gate · scale
  C *hidden, *grad_pre;      // (kGradientRows, R)
  C *down, *up;              // (R, columns)
  C *down_bias, *up_bias;    // (R), (columns)

  GradientScratch(Arena& arena, const Problem& p)
      : x(arena.take<C>(kGradientRows * columns)),
        grad(arena.take<C>(kGradientRows * columns)),
        hidden(arena.take<C>(kGradientRows * p.rank)),
        grad_pre(arena.take<C>(kGradientRows * p.rank)),
        down(arena.take<C>(p.rank * columns)),
        up(arena.take<C>(p.rank * columns)),
        down_bias(arena.take<C>(p.rank)),
        up_bias(arena.take<C>(columns)) {}
};

template <typename T>
void gradient(const ExpertGradients& op, int64_t first_column, void* memory) {
  using C = compute_t<T>;
  Arena arena{static_cast<char*>(memory)};
  const GradientScratch<C> s(arena, op);
  const int64_t rank = op.rank, ld = s.columns;
  const int64_t columns = op.width - first_column < ld ? op.width - first_column : ld;
  const int64_t panels = (columns + s.width - 1) / s.width;
  const int64_t tiles = (rank + kTileRows - 1) / kTileRows;
  const C* gates = static_cast<const C*>(op.gates);
  for (int64_t i = 0; i < rank * ld; ++i) s.down[i] = s.up[i] = C(0);
  for (int64_t r = 0; r < rank; ++r) s.down_bias[r] = C(0);
  for (int64_t d = 0; d < ld; ++d) s.up_bias[d] = C(0);

  const int64_t total = op.count * op.length;
  for (int64_t start = 0; start < total; start += kGradientRows) {
    const int64_t rows = total - start < kGradientRows ? total - start : kGradientRows;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pair = op.pairs[(start + i) / op.length], token = (start + i) % op.length;
      const int64_t sample = pair / op.slots;
      const C weight = gates[pair] * static_cast<C>(op.scale);
      const T* x = static_cast<const T*>(op.x.data) + sample * op.x.sample_stride + token * op.x.token_stride + first_column;
      const T* g = static_cast<const T*>(op.grad.data) + sample * op.grad.sample_stride + token * op.grad.token_stride + first_column;
      const T* h = static_cast<const T*>(op.hidden) + (pair * op.length + token) * rank;
      const C* pre = static_cast<const C*>(op.grad_pre) + (pair * op.length + token) * rank;
      for (int64_t d = 0; d < columns; ++d) s.x[i * ld + d] = static_cast<C>(load(x + d));
      for (int64_t d = 0; d < columns; ++d) s.grad[i * ld + d] = weight * static_cast<C>(load(g + d));
      for (int64_t d = columns; d < panels * s.width; ++d) s.x[i * ld + d] = s.grad[i * ld + d] = C(0);
      for (int64_t r = 0; r < rank; ++r) s.hidden[i * rank + r] = static_cast<C>(load(h + r));
      for (int64_t r = 0; r < rank; ++r) s.grad_pre[i * rank + r] = pre[r];
      for (int64_t r = 0; r < rank; ++r) s.down_bias[r] += pre[r];
      for (int64_t d = 0; d < columns; ++d) s.up_bias[d] += s.grad[i * ld + d];
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r = rank * t / tiles;
      const int n = static_cast<int>(rank * (t + 1) / tiles - r);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t d = panel * s.width;
        multiply_panel<C, true>(n, s.grad_pre + r, rank, s.x + d, ld, rows, s.width, s.down + r * ld + d, ld, true);
        multiply_panel<C, true>(n, s.hidden + r, rank, s.grad + d, ld, rows, s.width, s.up + r * ld + d, ld, true);
      }
    }
  }

  T* down = static_cast<T*>(op.down_weight) + op.expert * rank * op.width + first_column;
  T* up = static_cast<T*>(op.up_weight) + (op.expert * op.width + first_column) * rank;
  T* up_bias = static_cast<T*>(op.up_bias) + op.expert * op.width + first_column;
  for (int64_t r = 0; r < rank; ++r) {
    for (int64_t d = 0; d < columns; ++d) store(down + r * op.width + d, s.down[r * ld + d]);
  }
  for (int64_t d = 0; d < columns; ++d) {
    for (int64_t r = 0; r < rank; ++r) store(up + d * rank + r, s.up[r * ld + d]);
    store(up_bias + d, s.up_bias[d]);
  }
  if (first_column == 0) {
    T* down_bias = static_cast<T*>(op.down_bias) + op.expert * rank;
    for (int64_t r = 0; r < rank; ++r) store(down_bias + r, s.down_bias[r]);
  }
}

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

int64_t packed_bytes(Element type, int64_t K, int64_t n) {
  CLK_ELEMENT(type, T, K * padded<compute_t<T>>(n) * static_cast<int64_t>(sizeof(compute_t<T>)));
}

void pack_weight(Element type, const void* source, int64_t K, int64_t n, int64_t row, int64_t column, void* packed) {
  CLK_ELEMENT(type, T, pack(static_cast<const T*>(source), K, n, row, column, static_cast<compute_t<T>*>(packed)));
}

int64_t tile_scratch(const Problem& problem) {
  return problem.type == Element::f64 ? measure<double, Scratch>(problem) : measure<float, Scratch>(problem);
}

int64_t gradient_columns(Element type) {
  return kGradientPanels * 2 * (type == Element::f64 ? Vector<double>::width : Vector<float>::width);
}

int64_t gradient_scratch(const Problem& problem) {
  return problem.type == Element::f64 ? measure<double, GradientScratch>(problem) : measure<float, GradientScratch>(problem);
}

void forward_tile(const Forward& op, const Tile& tile, void* scratch) { CLK_ELEMENT(op.type, T, forward<T>(op, tile, scratch)); }

void backward_tile(const Backward& op, const Tile& tile, void* scratch) { CLK_ELEMENT(op.type, T, backward<T>(op, tile, scratch)); }

void gradient_block(const ExpertGradients& op, int64_t first_column, void* scratch) {
  CLK_ELEMENT(op.type, T, gradient<T>(op, first_column, scratch));
}

}  // namespace CLK_ISA
}  // namespace moe
}  // namespace clk

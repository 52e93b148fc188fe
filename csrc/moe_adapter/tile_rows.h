// The rows of one tile of tokens: where they lie, products with an expert's weights, and how results are written. For per-instruction-set
// files: internal linkage.
#pragma once

#include "common/convert.h"
#include "common/gemm.h"
#include "common/scalar.h"
#include "moe_adapter/arena.h"
#include "moe_adapter/cpu_kernels.h"

namespace clk {
namespace moe {
namespace {

template <typename C>
struct Scratch {
  C* rows;       // (kTileRows, D): the tile in compute type, where it cannot be read in place
  C* hidden;     // (k, kTileRows, ldh): times gate · scale, and forward that factor itself in column R
  C* panel;      // (kTileRows, panel width)
  int64_t* slot;    // (k, kTileRows): where each row has the tile's first, second, … expert
  int64_t* expert;  // (k): of those that exist
  int64_t ldh;      // R + 1 in whole panels

  Scratch(Arena& arena, const Problem& p)
      : rows(arena.take<C>(kTileRows * p.width)),
        hidden(arena.take<C>(p.slots * kTileRows * padded<C>(p.rank + 1))),
        panel(arena.take<C>(kTileRows * panel_width<C>(p.width))),
        slot(arena.take<int64_t>(p.slots * kTileRows)),
        expert(arena.take<int64_t>(p.slots)),
        ldh(padded<C>(p.rank + 1)) {}
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

// The rows of a tile in compute type: read in place where they are evenly spaced, copied into `buffer` otherwise.
template <typename T, typename C>
Matrix<C> compute_rows(const View& view, const Tile& t, const Rows& rows, int64_t width, C* buffer) {
  if constexpr (sizeof(T) == sizeof(C)) {
    if (!t.gathered) return {rows.in<const T>(view, 0), view.token_stride};
    const T* first = rows.in<const T>(view, 0);
    const int64_t step = rows.n > 1 ? rows.in<const T>(view, 1) - first : width;
    bool even = true;  // as where few choices leave the tokens in their own order
    for (int64_t i = 2; i < rows.n && even; ++i) even = rows.in<const T>(view, i) - first == i * step;
    if (even) return {first, step};
  }
  for (int64_t i = 0; i < rows.n; ++i) {
    const T* source = rows.in<const T>(view, i);
    convert(source, width, buffer + i * width);
  }
  return {buffer, width};
}

// C (rows, n) = A (rows, K) · the weights of one expert.
template <typename C>
void multiply(int64_t rows, Matrix<C> a, const Weights& weights, int64_t expert, int64_t K, int64_t n, C* c, int64_t ldc) {
  const int64_t width = panel_width<C>(n);
  const C* panel = static_cast<const C*>(weights.experts[expert]);
  for (int64_t start = 0; start < n; start += width, panel += weights.step) {
    multiply_panel<C>(static_cast<int>(rows), a.data, a.ld, panel, weights.ld, K, width, c + start, ldc, false);
  }
}

// Σ a·b with four vectors of running sums, added up in a fixed order.
template <typename C, typename T>
C dot(const C* a, const T* b, int64_t n) {
  constexpr int64_t W = kLanes<C>;
  Vec<C> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int u = 0; u < 4; ++u) sums[u] += load_vector(a + i + u * W) * load_vector(b + i + u * W);
  }
  for (; i + W <= n; i += W) sums[0] += load_vector(a + i) * load_vector(b + i);
  C total = sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += a[i] * static_cast<C>(load(b + i));
  return total;
}

// What is added to one panel of one row before it is written.
template <typename T, typename C>
struct RowEnd {
  const C* line;   // the product
  const T* before; // the residual or what is there already, or null
  const T* also;   // what is added to the residual first, or null
  const C* sum;    // what is there already, in compute type, or null
  C* next_sum;     // where the result goes in compute type, or null: to target
  T* target;
};

template <typename T, typename C>
void end_row(const RowEnd<T, C>& r, int64_t columns) {
  constexpr int64_t W = kLanes<C>;
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    Vec<C> total = load_vector(r.line + j);
    if (r.before && r.also) {
      total += load_vector(r.before + j) + load_vector(r.also + j);
    } else if (r.before) {
      total += load_vector(r.before + j);
    }
    if (r.sum) total += load_vector(r.sum + j);
    if (r.next_sum) {
      store_vector(r.next_sum + j, total);
    } else {
      store_vector(r.target + j, total);
    }
  }
  for (; j < columns; ++j) {
    C total = r.line[j];
    if (r.before && r.also) {
      total += static_cast<C>(load(r.before + j)) + static_cast<C>(load(r.also + j));
    } else if (r.before) {
      total += static_cast<C>(load(r.before + j));
    }
    if (r.sum) total += r.sum[j];
    if (r.next_sum) {
      r.next_sum[j] = total;
    } else {
      store(r.target + j, total);
    }
  }
}

template <int WRITE, typename T>
void fetch(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, WRITE);
}

// What the rows need from memory next: the columns that are about to be written, and those of the next tile's rows in `source`, whose
// scattered addresses the hardware cannot foresee.
template <typename T, typename C>
void fetch_columns(const Problem& p, const Tile& t, const Rows& rows, const View& source, const View& residual, const View& out, int64_t start,
                   int64_t columns) {
  for (int64_t i = 0; i < rows.n; ++i) {
    fetch<1>(rows.in<T>(out, i) + start, columns);
    if (!t.gathered) continue;
    if (t.opens && residual.data) fetch<0>(rows.in<T>(residual, i) + start, columns);
    if (p.sums) fetch<1>(static_cast<C*>(p.sums) + (rows.sample[i] * p.length + rows.token[i]) * p.width + start, columns);
  }
  for (int64_t i = 0; t.gathered && i < t.following; ++i) {
    const int64_t index = t.gathered[t.rows + i];
    const int64_t offset = index / p.length * source.sample_stride + index % p.length * source.token_stride;
    fetch<0>(static_cast<const T*>(source.data) + offset + start, columns);
  }
}

// out rows (+)= Σ_s hidden_s · widen[expert_s], products of this depth, plus what belongs to the rows: earlier slots, or the residual and
// what `also` is added to it.
template <typename T, typename C>
void write_rows(const Problem& p, const Tile& t, const Rows& rows, const Scratch<C>& s, int64_t active, int64_t depth, const View& source,
                const View& residual, const View& also, const View& out) {
  const int64_t width = panel_width<C>(p.width);
  C* sums = static_cast<C*>(p.sums);
  for (int64_t start = 0; start < p.width; start += width) {
    const int64_t columns = p.width - start < width ? p.width - start : width;
    fetch_columns<T, C>(p, t, rows, source, residual, out, start, columns);
    for (int64_t a = 0; a < active; ++a) {
      const C* weights = static_cast<const C*>(p.widen.experts[s.expert[a]]) + start / width * p.widen.step;
      multiply_panel<C>(static_cast<int>(rows.n), s.hidden + a * kTileRows * s.ldh, s.ldh, weights, p.widen.ld, depth, width, s.panel, width,
                        a > 0);
    }
    if (active == 0) {
      for (int64_t i = 0; i < rows.n * width; ++i) s.panel[i] = C(0);
    }
    for (int64_t i = 0; i < rows.n; ++i) {
      C* sum = sums ? sums + (rows.sample[i] * p.length + rows.token[i]) * p.width + start : nullptr;
      RowEnd<T, C> row{};
      row.line = s.panel + i * width;
      row.target = rows.in<T>(out, i) + start;
      if (t.opens && residual.data) row.before = rows.in<const T>(residual, i) + start;
      if (t.opens && residual.data && also.data) row.also = rows.in<const T>(also, i) + start;
      if (!t.opens && !sum) row.before = row.target;
      if (!t.opens) row.sum = sum;
      if (!t.closes) row.next_sum = sum;
      end_row(row, columns);
    }
  }
}

}  // namespace
}  // namespace moe
}  // namespace clk

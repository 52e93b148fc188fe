// Distillation from features, backward, one instruction set: the gradient of a tile from the saved log-sum-exps, and its products with
// anchors and student, which add up over the tiles of a rectangle.
#pragma once

#include "distill_kl/feature_tiles.h"

namespace clk {
namespace {

// g += factor * weight * exp(z - lse) down the rows and across the columns; the signs are in the factors.
template <typename C, typename T>
inline void add_probabilities(const Tiles<C, T>& tiles, C* g, const C* z, int64_t n, int64_t m, C row_factor, const C* row_lse,
                              const C* row_weight, C column_factor, const C* column_lse, const C* column_weight) {
  const FeatureProblem& p = tiles.p;
  for (int64_t i = 0; i < tiles.columns_at(m); ++i) {
    const C lse = p.columns ? column_lse[m + i] : C(0);
    const C outside = p.columns && column_weight ? column_factor * column_weight[m + i] : column_factor;
    for (int64_t v = 0; v < tiles.lanes_at(n); v += kLanes<C>) {
      const int64_t at = i * kBlockRows + v;
      const Vec<C> value = load_vector(z + at), w = load_vector(row_weight + n + v);
      Vec<C> sum = load_vector(g + at);
      if (p.rows) sum += row_factor * w * exponential(value - load_vector(row_lse + n + v));
      if (p.columns) {
        const Vec<C> e = outside * exponential(value - lse);
        sum += column_weight ? e : e * w;
      }
      store_vector(g + at, sum);
    }
  }
}

template <typename C, typename T>
inline void backward_task(const FeatureProblem& p, const FeatureTask& task, const FeatureBackward& b) {
  Arena arena{static_cast<char*>(task.scratch)};
  const Tiles<C, T> tiles(p, task, arena);
  const int64_t line = padded<C>(p.d), blocks = (task.n1 - task.n0 + kBlockRows - 1) / kBlockRows;
  C* g = arena.take<C>(kBlock);
  C* packed_anchors = arena.take<C>(kBlockColumns * line);  // panels over d
  C* packed_rows = arena.take<C>(b.need_anchors ? blocks * kBlockRows * line : 0);
  for (int64_t n = task.n0; b.need_anchors && n < task.n1; n += kBlockRows) {
    pack<C>(static_cast<const T*>(p.student) + n * p.d, tiles.rows_at(n), p.d, p.d, 1, packed_rows + (n - task.n0) * line);
  }
  const C *row_stats = static_cast<const C*>(b.row_stats), *column_stats = static_cast<const C*>(b.column_stats);
  const C *row_weight = static_cast<const C*>(b.row_weight), *weight = static_cast<const C*>(p.weight);
  const C row_factor = static_cast<C>(b.row_factor), column_factor = static_cast<C>(b.column_factor);
  for (int64_t m = task.m0; m < task.m1; m += kBlockColumns) {
    const int64_t columns = tiles.columns_at(m);
    tiles.load_anchors(m);
    if (b.need_rows) pack<C, C>(tiles.anchors, columns, p.d, anchor_stride(p.d), 1, packed_anchors);
    for (int64_t n = task.n0; n < task.n1; n += kBlockRows) {
      const int64_t rows = tiles.rows_at(n);
      tiles.student_logits(n, m);
      for (int64_t i = 0; i < kBlock; ++i) g[i] = 0;
      add_probabilities(tiles, g, tiles.zs, n, m, row_factor, row_stats, row_weight, column_factor, column_stats,
                        column_stats + p.M);
      for (int64_t k = 0; k < p.K; ++k) {
        tiles.teacher_logits(k, n, m);
        add_probabilities<C, T>(tiles, g, tiles.zt, n, m, -row_factor, row_stats + (1 + k) * p.N_padded, weight + k * p.N_padded,
                                -column_factor, column_stats + (2 + k) * p.M, nullptr);
      }
      if (p.mask_diagonal) tiles.on_diagonal(n, m, [&](int64_t at) { g[at] = 0; });
      if (b.need_rows) {
        product<C, true>(g, kBlockRows, rows, packed_anchors, columns, p.d, static_cast<C*>(task.rows) + n * line, line, true);
      }
      if (b.need_anchors) {
        product<C, false>(g, kBlockRows, columns, packed_rows + (n - task.n0) * line, rows, p.d,
                          static_cast<C*>(task.columns) + m * line, line, true);
      }
    }
  }
}

}  // namespace
}  // namespace clk

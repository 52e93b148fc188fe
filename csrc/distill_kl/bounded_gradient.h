// The gradients of bounded distillation from the exponentials of a task, kept or formed again, one instruction set; see bounded.h.
#pragma once

#include "distill_kl/bounded_tiles.h"

namespace clk {
namespace {

// The gradient of a tile with respect to the student's logits: [columns][kBlockRows].
template <typename C, typename T>
inline void tile_gradient(const BoundedTiles<C, T>& tiles, int64_t block, int64_t m, const BoundedGradient& gradient, C* to) {
  constexpr int64_t W = kLanes<C>;
  const FeatureProblem& p = tiles.p;
  const int64_t lanes = whole<C>(tiles.rows_at(block)), n = block * kBlockRows;
  const C *e = tiles.tile(block, m), *row = static_cast<const C*>(gradient.row_factors) + n;
  const C *column = static_cast<const C*>(gradient.column_factors) + m, *weight = static_cast<const C*>(p.weight) + n;
  for (int64_t i = 0; i < tiles.columns_at(m); ++i, e += tiles.step, to += kBlockRows) {
    for (int64_t v = 0; v < lanes; v += W) {
      Vec<C> g = load_vector(e + v) * (load_vector(row + v) + column[i]);
      for (int64_t k = 0; k < p.K; ++k) {
        const Vec<C> b = load_vector(row + (1 + k) * p.N_padded + v), w = load_vector(weight + k * p.N_padded + v);
        g -= load_vector(e + (1 + k) * kBlockRows + v) * (b + column[(1 + k) * p.M + i] * w);
      }
      store_vector(to + v, g);
    }
  }
}

template <typename C, typename T>
inline bool gradient_task(const BoundedProblem& b, const BoundedTask& task, const BoundedGradient& gradient) {
  const FeatureProblem& p = *b.features;
  BoundedTiles<C, T> tiles(b, task);
  const int64_t line = whole<C>(p.d);
  C* g = tiles.student_power;
  for (int64_t m = task.m0; m < task.m1; m += kBlockColumns) {
    const int64_t columns = tiles.columns_at(m);
    tiles.load_anchors(m, true);
    for (int64_t block = task.first; block < task.last; ++block) {
      const int64_t rows = tiles.rows_at(block), n = block * kBlockRows;
      for (int64_t slot = 0; slot < tiles.slots && !tiles.kept(m); ++slot) {
        if (!tiles.exponentials(slot, block, m, g)) return false;
      }
      tile_gradient(tiles, block, m, gradient, g);
      if (gradient.rows) {
        multiply_rows<C, true>(g, kBlockRows, rows, tiles.anchors, columns, line, static_cast<C*>(gradient.rows) + n * line, line,
                               m > task.m0);
      }
      if (gradient.columns) {
        const Rows<C> student = rows_of<C, T>(p.student, n, rows, p.d, true, tiles.rest);
        multiply_rows<C, false>(g, kBlockRows, columns, student, rows, line, static_cast<C*>(gradient.columns) + m * line, line,
                                block > task.first);
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace clk

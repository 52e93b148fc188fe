// The sums of bounded distillation over the rows and columns of a task, one instruction set; see bounded.h for which.
#pragma once

#include "distill_kl/bounded_tiles.h"

namespace clk {
namespace {

template <typename C>
inline void add_lanes(double* to, Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int i = 0; i < kLanes<C>; ++i) to[i] += lanes[i];
}

template <typename C>
inline void add_to(C* to, Vec<C> v) {
  store_vector(to, load_vector(to) + v);
}

// Sums of one student tile: down the columns into `rows`, across the lanes into vectors of partial sums, one for each column.
template <typename C, int U>
inline void student_sums(const C* e, int64_t step, int64_t columns, double* rows, C* across) {
  constexpr int W = kLanes<C>;
  Vec<C> down[U] = {};
  for (int64_t i = 0; i < columns; ++i) {
    Vec<C> sum{};
    for (int u = 0; u < U; ++u) {
      const Vec<C> value = load_vector(e + i * step + u * W);
      down[u] += value;
      sum += value;
    }
    add_to(across + i * W, sum);
  }
  for (int u = 0; u < U; ++u) add_lanes<C>(rows + u * W, down[u]);
}

// The same for one teacher: Σ e, Σ e y of the rows, `next` apart; Σ e, Σ w e, Σ w e y of the columns.
template <typename C, int U, bool WEIGHTED, bool KL>
inline void teacher_sums(const C* e, const C* power, const C* student_power, const C* weight, int64_t step, int64_t columns,
                         double* rows, int64_t next, C* across) {
  constexpr int W = kLanes<C>;
  Vec<C> down[U] = {}, down_y[U] = {}, w[U];
  for (int u = 0; u < U; ++u) w[u] = load_vector(weight + u * W);
  C *across_w = across + kBlockColumns * W, *across_y = across_w + kBlockColumns * W;
  for (int64_t i = 0; i < columns; ++i) {
    Vec<C> sum{}, sum_w{}, sum_y{};
    for (int u = 0; u < U; ++u) {
      const Vec<C> value = load_vector(e + i * step + u * W);
      Vec<C> y = load_vector(student_power + i * kBlockRows + u * W);
      if (KL) y -= load_vector(power + i * kBlockRows + u * W);
      y *= value;
      down[u] += value;
      down_y[u] += y;
      sum += value;
      sum_y += WEIGHTED ? y * w[u] : y;
      if (WEIGHTED) sum_w += value * w[u];
    }
    add_to(across + i * W, sum);
    if (WEIGHTED) add_to(across_w + i * W, sum_w);
    add_to(across_y + i * W, sum_y);
  }
  for (int u = 0; u < U; ++u) {
    add_lanes<C>(rows + u * W, down[u]);
    add_lanes<C>(rows + next + u * W, down_y[u]);
  }
}

template <typename C, typename T, int U>
inline void add_sums(const BoundedTiles<C, T>& tiles, int64_t block, int64_t m, int64_t v, int64_t slot, const BoundedSums& sums) {
  constexpr int64_t W = kLanes<C>, vectors = kBlockColumns * W;
  const FeatureProblem& p = tiles.p;
  const int64_t columns = tiles.columns_at(m), n = block * kBlockRows + v, next = p.N_padded;
  const C* e = tiles.tile(block, m) + slot * kBlockRows + v;
  if (slot == 0) return student_sums<C, U>(e, tiles.step, columns, sums.rows + n, tiles.rest);
  const C* weight = static_cast<const C*>(p.weight) + (slot - 1) * next + n;
  const auto run = tiles.b.weighted ? (p.kl ? teacher_sums<C, U, true, true> : teacher_sums<C, U, true, false>)
                                    : (p.kl ? teacher_sums<C, U, false, true> : teacher_sums<C, U, false, false>);
  run(e, tiles.teacher_power + v, tiles.student_power + v, weight, tiles.step, columns, sums.rows + (2 * slot - 1) * next + n, next,
      tiles.rest + (3 * slot - 2) * vectors);
}

template <typename C, typename T>
inline bool sums_task(const BoundedProblem& b, const BoundedTask& task, const BoundedSums& sums) {
  constexpr int64_t W = kLanes<C>;
  const FeatureProblem& p = *b.features;
  BoundedTiles<C, T> tiles(b, task);
  const int64_t vectors = (1 + 3 * p.K) * kBlockColumns;
  for (int64_t m = task.m0; m < task.m1; m += kBlockColumns) {
    tiles.load_anchors(m, false);
    for (int64_t i = 0; i < vectors * W; ++i) tiles.rest[i] = 0;
    for (int64_t block = task.first; block < task.last; ++block) {
      const int64_t lanes = whole<C>(tiles.rows_at(block));
      for (int64_t slot = 0; slot < tiles.slots; ++slot) {
        if (!tiles.exponentials(slot, block, m, slot ? tiles.teacher_power : tiles.student_power)) return false;
        int64_t v = 0;
        for (; v + 2 * W <= lanes; v += 2 * W) add_sums<C, T, 2>(tiles, block, m, v, slot, sums);
        if (v < lanes) add_sums<C, T, 1>(tiles, block, m, v, slot, sums);
      }
    }
    for (int64_t s = 0; s < 1 + 3 * p.K; ++s) {
      const int64_t from = !b.weighted && s % 3 == 2 ? s - 1 : s;  // without weights Σ w e is Σ e
      for (int64_t i = 0; i < tiles.columns_at(m); ++i) {
        sums.columns[s * p.M + m + i] = sum_lanes<C>(load_vector(tiles.rest + (from * kBlockColumns + i) * W));
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace clk

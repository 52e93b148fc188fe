// Distillation from features, forward, one instruction set: running statistics of the softmaxes over a rectangle of the similarity
// matrix, tile by tile. Rows keep theirs in lanes, down the tile; columns across the lanes.
#pragma once

#include "distill_kl/feature_tiles.h"

namespace clk {
namespace {

template <typename C>
inline C* teacher_stats(C* stats, int64_t k, int64_t n) {
  return stats + (kStudentStats + k * kTeacherStats) * n;
}

// Softmax over the anchors: lane states come from and go to the row statistics.
template <typename C, typename T>
inline void student_rows_forward(const Tiles<C, T>& tiles, int64_t n, int64_t m, Vec<C>* moves) {
  C* stats = static_cast<C*>(tiles.task.rows);
  for (int64_t v = 0; v < tiles.lanes_at(n); v += kLanes<C>) {
    C *max = stats + n + v, *sum = max + tiles.p.N_padded;
    StudentState<C> s{load_vector(max), load_vector(sum)};
    moves[v / kLanes<C>] = update<C>(s, tiles.zs + v, tiles.columns_at(m), kBlockRows);
    store_vector(max, s.m);
    store_vector(sum, s.sum);
  }
}

template <typename C, typename T>
inline void teacher_rows_forward(const Tiles<C, T>& tiles, int64_t k, int64_t n, int64_t m, const Vec<C>* moves) {
  const int64_t N = tiles.p.N_padded;
  C* stats = static_cast<C*>(tiles.task.rows);
  for (int64_t v = 0; v < tiles.lanes_at(n); v += kLanes<C>) {
    C* at = teacher_stats(stats, k, N) + n + v;
    const StudentState<C> s{load_vector(stats + n + v), Vec<C>{}};
    TeacherState<C> t{load_vector(at), load_vector(at + N), load_vector(at + 3 * N), load_vector(at + 4 * N)};
    update<C>(t, s, moves[v / kLanes<C>], tiles.zt + v, tiles.zs + v, tiles.columns_at(m), kBlockRows);
    store_vector(at, t.m);
    store_vector(at + N, t.sum);
    store_vector(at + 3 * N, t.cross);
    store_vector(at + 4 * N, t.entropy);
  }
}

template <typename C>
inline C finite(C maximum) {
  return maximum == -kInfinity<C> ? C(0) : maximum;
}

template <typename C>
inline C max_of_lanes(C start, const C* z, int64_t lanes) {
  Vec<C> m = splat(start);
  m = max_of<C>(m, z, lanes / kLanes<C>, kLanes<C>);
  return max_lanes<C>(m);
}

template <typename C>
inline C exp_from(C maximum, C from) {
  return maximum == from ? C(1) : exponential(maximum - from);
}

// Softmax over the rows: one anchor at a time, across the lanes.
template <typename C, typename T>
inline void student_columns_forward(const Tiles<C, T>& tiles, int64_t n, int64_t m, C* moves) {
  C *max = static_cast<C*>(tiles.task.columns) + m, *sum = max + tiles.p.M;
  const int64_t lanes = tiles.lanes_at(n);
  for (int64_t i = 0; i < tiles.columns_at(m); ++i) {
    const C* z = tiles.zs + i * kBlockRows;
    const C highest = max_of_lanes<C>(max[i], z, lanes), from = finite(highest);
    Vec<C> total{};
    for (int64_t v = 0; v < lanes; v += kLanes<C>) total += exponential(load_vector(z + v) - from);
    moves[i] = finite(max[i]) - from;
    sum[i] = sum[i] * exp_from(max[i], from) + sum_lanes<C>(total);
    max[i] = highest;
  }
}

template <typename C, typename T>
inline void teacher_columns_forward(const Tiles<C, T>& tiles, int64_t k, int64_t n, int64_t m, const C* moves) {
  const int64_t M = tiles.p.M, lanes = tiles.lanes_at(n);
  const C* student_max = static_cast<const C*>(tiles.task.columns) + m;
  C* max = teacher_stats(static_cast<C*>(tiles.task.columns), k, M) + m;
  C *sum = max + M, *mass = sum + M, *cross = mass + M, *entropy = cross + M;
  const C* weight = static_cast<const C*>(tiles.p.weight) + k * tiles.p.N_padded + n;
  for (int64_t i = 0; i < tiles.columns_at(m); ++i) {
    const C *z = tiles.zt + i * kBlockRows, *zs = tiles.zs + i * kBlockRows;
    const C highest = max_of_lanes<C>(max[i], z, lanes), from = finite(highest), from_s = finite(student_max[i]);
    Vec<C> s{}, w{}, c{}, h{};
    for (int64_t v = 0; v < lanes; v += kLanes<C>) {
      const Vec<C> relative = load_vector(z + v) - from;
      const Vec<C> e = exponential(relative), we = e * load_vector(weight + v);
      s += e;
      w += we;
      c += e == 0 ? Vec<C>{} : we * (load_vector(zs + v) - from_s);
      h += e == 0 ? Vec<C>{} : we * relative;
    }
    const C shrink = exp_from(max[i], from);
    cross[i] = shrink * (cross[i] + mass[i] * moves[i]) + sum_lanes<C>(c);
    entropy[i] = shrink * (entropy[i] + mass[i] * (finite(max[i]) - from)) + sum_lanes<C>(h);
    mass[i] = mass[i] * shrink + sum_lanes<C>(w);
    sum[i] = sum[i] * shrink + sum_lanes<C>(s);
    max[i] = highest;
  }
}

template <typename C, typename T>
inline void forward_task(const FeatureProblem& p, const FeatureTask& task) {
  Arena arena{static_cast<char*>(task.scratch)};
  const Tiles<C, T> tiles(p, task, arena);
  Vec<C> row_moves[kBlockRows / kLanes<C>];
  C column_moves[kBlockColumns];
  for (int64_t m = task.m0; m < task.m1; m += kBlockColumns) {
    tiles.load_anchors(m);
    for (int64_t n = task.n0; n < task.n1; n += kBlockRows) {
      tiles.student_logits(n, m);
      tiles.close_lanes(tiles.zs, n, m);
      if (p.rows) student_rows_forward(tiles, n, m, row_moves);
      if (p.columns) student_columns_forward(tiles, n, m, column_moves);
      for (int64_t k = 0; k < p.K; ++k) {
        tiles.teacher_logits(k, n, m);
        tiles.close_lanes(tiles.zt, n, m);
        if (p.rows) teacher_rows_forward(tiles, k, n, m, row_moves);
        if (p.columns) teacher_columns_forward(tiles, k, n, m, column_moves);
      }
    }
  }
}

}  // namespace
}  // namespace clk

// Distillation from features, one instruction set: a rectangle of the similarity matrix, tile by tile, forward and backward.
//
// A tile holds kBlockColumns anchors by kBlockRows rows, anchors outermost: the anchors are read as they lie and the few rows are packed
// once per task, so nothing large is transposed. Rows are lanes; the softmax over the anchors runs down the tile, the one over the
// rows across its lanes. Student and teachers share the anchors of a tile while these are in cache.
#pragma once

#include "common/gemm.h"
#include "distill_kl/cpu_kernels.h"
#include "distill_kl/online.h"

namespace clk {
namespace {

constexpr int64_t kBlock = kBlockColumns * kBlockRows;

// Hands out pieces of the scratch memory, each starting on a cache line.
struct Arena {
  char* next;
  template <typename C>
  C* take(int64_t n) {
    C* piece = reinterpret_cast<C*>(next);
    next += (n * static_cast<int64_t>(sizeof(C)) + 63) / 64 * 64;
    return piece;
  }
};

// Elements between the rows of the copied anchors: off the powers of two, whose rows would share cache sets.
inline int64_t anchor_stride(int64_t d) { return (d + 15) / 16 * 16 + 16; }

// C (I x J) = A B or += A B for panels of B as `pack` writes them; A is (I, K) with leading dimension lda or, transposed, (K, I).
template <typename C, bool TRANSPOSED>
inline void product(const C* a, int64_t lda, int64_t I, const C* panels, int64_t K, int64_t J, C* c, int64_t ldc, bool accumulate) {
  const int64_t width = panel_width<C>(J);
  for (int64_t j = 0; j < J; j += width, panels += K * width) {
    for (int64_t i = 0; i < I; i += kTileRows) {
      const int rows = static_cast<int>(I - i < kTileRows ? I - i : kTileRows);
      multiply_panel<C, TRANSPOSED>(rows, TRANSPOSED ? a + i : a + i * lda, lda, panels, width, K, width, c + i * ldc + j, ldc,
                                    accumulate);
    }
  }
}

template <typename C, typename T>
struct Tiles {
  const FeatureProblem& p;
  const FeatureTask& task;
  C *student_rows, *teacher_rows;   // packed panels [row block][d][kBlockRows], [k][row block][d_t][kBlockRows]
  C *anchors, *teacher_anchors;     // [kBlockColumns][anchor_stride], the same memory if shared
  C *zs, *zt;                       // [kBlockColumns][kBlockRows]

  Tiles(const FeatureProblem& problem, const FeatureTask& t, Arena& arena) : p(problem), task(t) {
    const int64_t blocks = (t.n1 - t.n0 + kBlockRows - 1) / kBlockRows;
    student_rows = arena.take<C>(blocks * kBlockRows * p.d);
    teacher_rows = arena.take<C>(p.K * blocks * kBlockRows * p.d_t);
    anchors = arena.take<C>(kBlockColumns * anchor_stride(p.d));
    teacher_anchors = p.teacher_anchors ? arena.take<C>(kBlockColumns * anchor_stride(p.d_t)) : anchors;
    zs = arena.take<C>(kBlock);
    zt = arena.take<C>(kBlock);
    for (int64_t n = t.n0; n < t.n1; n += kBlockRows) {
      pack_block(student_rows + (n - t.n0) * p.d, static_cast<const T*>(p.student), n, p.d);
      for (int64_t k = 0; k < p.K; ++k) {
        C* to = teacher_rows + (k * blocks * kBlockRows + n - t.n0) * p.d_t;
        pack_block(to, static_cast<const T*>(p.teacher) + k * p.N * p.d_t, n, p.d_t);
      }
    }
  }

  int64_t rows_at(int64_t n) const { return task.n1 - n < kBlockRows ? task.n1 - n : kBlockRows; }
  int64_t columns_at(int64_t m) const { return task.m1 - m < kBlockColumns ? task.m1 - m : kBlockColumns; }

  // Lanes that a row block occupies: whole panels.
  int64_t lanes_at(int64_t n) const { return padded<C>(rows_at(n)); }

  void pack_block(C* to, const T* from, int64_t n, int64_t d) const { pack<C>(from + n * d, d, rows_at(n), 1, d, to); }

  void copy(C* to, const void* from, int64_t m, int64_t d) const {
    const T* source = static_cast<const T*>(from) + m * d;
    for (int64_t i = 0; i < columns_at(m); ++i, to += anchor_stride(d), source += d) {
      for (int64_t j = 0; j < d; ++j) to[j] = load(source + j);
    }
  }

  void load_anchors(int64_t m) const {
    copy(anchors, p.anchors, m, p.d);
    if (p.teacher_anchors) copy(teacher_anchors, p.teacher_anchors, m, p.d_t);
  }

  // z = logits / temperature of a tile; lanes beyond the rows are undefined.
  void student_logits(int64_t n, int64_t m) const { logits(zs, student_rows + (n - task.n0) * p.d, anchors, n, m, p.d); }
  void teacher_logits(int64_t k, int64_t n, int64_t m) const {
    const int64_t padded = (task.n1 - task.n0 + kBlockRows - 1) / kBlockRows * kBlockRows;
    logits(zt, teacher_rows + (k * padded + n - task.n0) * p.d_t, teacher_anchors, n, m, p.d_t);
  }

  void logits(C* z, const C* panels, const C* from, int64_t n, int64_t m, int64_t d) const {
    product<C, false>(from, anchor_stride(d), columns_at(m), panels, d, rows_at(n), z, kBlockRows, false);
    const C scale = static_cast<C>(p.scale);
    for (int64_t i = 0; i < columns_at(m) * kBlockRows; ++i) z[i] *= scale;
    if (p.mask_diagonal) on_diagonal(n, m, [&](int64_t at) { z[at] = static_cast<C>(p.masked); });
  }

  template <typename F>
  void on_diagonal(int64_t n, int64_t m, const F& f) const {
    for (int64_t i = 0; i < columns_at(m); ++i) {
      const int64_t lane = m + i - n;
      if (lane >= 0 && lane < rows_at(n)) f(i * kBlockRows + lane);
    }
  }

  // The softmax over the rows must not see the lanes beyond them.
  void close_lanes(C* z, int64_t n, int64_t m) const {
    const int64_t rows = rows_at(n), lanes = lanes_at(n);
    for (int64_t i = 0; i < columns_at(m); ++i) {
      for (int64_t j = rows; j < lanes; ++j) z[i * kBlockRows + j] = -kInfinity<C>;
    }
  }
};

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

// Upper bound of what the arena of a task with `rows` rows hands out, in bytes.
inline int64_t scratch_bytes(const FeatureProblem& p, int64_t rows, bool backward) {
  const int64_t size = p.dtype == Dtype::f64 ? 8 : 4, blocks = (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  const int64_t line = p.dtype == Dtype::f64 ? padded<double>(p.d) : padded<float>(p.d);
  int64_t elements = blocks * (p.d + p.K * p.d_t) + kBlockColumns * (anchor_stride(p.d) + anchor_stride(p.d_t)) + 2 * kBlock;
  if (backward) elements += kBlock + (kBlockColumns + blocks) * line;
  return elements * size + 16 * 64;
}

}  // namespace
}  // namespace clk

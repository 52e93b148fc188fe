// Tiles of the similarity matrix, for distillation from features in one instruction set: scratch memory, packed rows, logits.
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

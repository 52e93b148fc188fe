// Bounded distillation from features, one instruction set; see bounded.h for what it computes.
//
// A tile holds kBlockColumns anchors by kBlockRows rows of the student and of every teacher, anchors outermost. fp32 and fp64 anchors
// are read where they lie, by both products: a row of anchors is broadcast element by element against packed rows for the logits,
// and read as vectors for the gradient. 16-bit anchors are converted block by block.
#pragma once

#include "distill_kl/bounded.h"
#include "distill_kl/bounded_rows.h"
#include "distill_kl/power.h"

namespace clk {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// The student's and the teachers' rows of a block, with the scale of their logits, in powers of two, in them.
template <typename C, typename T>
inline void pack_block(const FeatureProblem& p, int64_t block, void* packed) {
  C* to = static_cast<C*>(packed) + block * (p.d + p.K * p.d_t) * kBlockRows;
  const int64_t n0 = block * kBlockRows, n = p.N - n0 < kBlockRows ? p.N - n0 : kBlockRows;
  const C factor = static_cast<C>(p.scale * kLog2E);
  pack_rows<C, T>(p.student, n0, n, p.d, factor, to);
  to += p.d * kBlockRows;
  for (int64_t k = 0; k < p.K; ++k, to += p.d_t * kBlockRows) pack_rows<C, T>(p.teacher, k * p.N + n0, n, p.d_t, factor, to);
}

template <typename C, typename T>
class BoundedTiles {
 public:
  BoundedTiles(const BoundedProblem& problem, const BoundedTask& t)
      : b(problem), p(*problem.features), task(t), slots(1 + p.K), step(slots * kBlockRows) {
    char* next = static_cast<char*>(t.scratch);
    const auto take = [&](int64_t n) {
      C* piece = reinterpret_cast<C*>(next);
      next += (n * static_cast<int64_t>(sizeof(C)) + 63) / 64 * 64;
      return piece;
    };
    converted = take(kBlockColumns * (whole<C>(p.d) + kLanes<C>));
    converted_teacher = take(kBlockColumns * (whole<C>(p.d_t) + kLanes<C>));
    student_power = take(kBlockColumns * kBlockRows);
    teacher_power = take(kBlockColumns * kBlockRows);
    own = take(kBlockColumns * step);
    rest = take(rest_elements(p));
  }

  static int64_t bytes(const FeatureProblem& p) {
    const int64_t columns = whole<C>(p.d) + whole<C>(p.d_t) + 2 * kLanes<C> + (3 + p.K) * kBlockRows;
    return (columns * kBlockColumns + rest_elements(p)) * static_cast<int64_t>(sizeof(C)) + 7 * 64;
  }

  // Partial sums of the columns, or a block of rows of the student.
  static int64_t rest_elements(const FeatureProblem& p) {
    const int64_t sums = (1 + 3 * p.K) * kBlockColumns * kLanes<C>, student = kBlockRows * (whole<C>(p.d) + kLanes<C>);
    return sums > student ? sums : student;
  }

  int64_t rows_at(int64_t block) const { return p.N - block * kBlockRows < kBlockRows ? p.N - block * kBlockRows : kBlockRows; }
  int64_t columns_at(int64_t m) const { return task.m1 - m < kBlockColumns ? task.m1 - m : kBlockColumns; }
  bool kept(int64_t m) const { return m < b.kept_columns; }

  // Where the exponentials of a tile are: [columns][1 + K][kBlockRows].
  C* tile(int64_t block, int64_t m) const {
    return kept(m) ? static_cast<C*>(b.kept) + (block * b.kept_columns + m) * step : own;
  }

  // `for_rows`: they are to be read as whole vectors, too.
  void load_anchors(int64_t m, bool for_rows) {
    anchors = teacher_anchors = rows_of<C, T>(p.anchors, m, columns_at(m), p.d, for_rows, converted);
    if (p.teacher_anchors && !(for_rows && kept(m))) {
      teacher_anchors = rows_of<C, T>(p.teacher_anchors, m, columns_at(m), p.d_t, false, converted_teacher);
    }
  }

  // log2 exp(z) of student (slot 0) or teacher k (slot 1 + k) into `power` [columns][kBlockRows], and the exponentials into the tile;
  // false if one is out of bounds.
  bool exponentials(int64_t slot, int64_t block, int64_t m, C* power) const {
    const C* packed = static_cast<const C*>(b.packed) + (block * (p.d + p.K * p.d_t) + (slot ? p.d + (slot - 1) * p.d_t : 0)) * kBlockRows;
    slot ? product(teacher_anchors, block, m, packed, p.d_t, power) : product(anchors, block, m, packed, p.d, power);
    return exponentials(block, m, power, tile(block, m) + slot * kBlockRows);
  }

  const BoundedProblem& b;
  const FeatureProblem& p;
  const BoundedTask& task;
  const int64_t slots, step;
  Rows<C> anchors{}, teacher_anchors{};
  C *student_power, *teacher_power;  // [kBlockColumns][kBlockRows]
  C* rest;

 private:
  C *converted, *converted_teacher, *own;

  bool exponentials(int64_t block, int64_t m, const C* power, C* to) const {
    const int64_t rows = rows_at(block), lanes = whole<C>(rows), columns = columns_at(m);
    Magnitude<C> most;
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t v = 0; v < lanes; v += kLanes<C>) {
        const Vec<C> x = load_vector(power + i * kBlockRows + v);
        most.see(x);
        store_vector(to + i * step + v, power_of_two(x));
      }
    }
    for (int64_t i = 0; i < columns && (rows < lanes || p.mask_diagonal); ++i) {
      for (int64_t v = rows; v < lanes; ++v) to[i * step + v] = 0;
      const int64_t lane = m + i - block * kBlockRows;
      if (p.mask_diagonal && lane >= 0 && lane < rows) to[i * step + lane] = 0;
    }
    return most.within(static_cast<C>(kLargestPower));
  }

  void product(Rows<C> from, int64_t block, int64_t m, const C* packed, int64_t d, C* to) const {
    const int64_t lanes = whole<C>(rows_at(block)), columns = columns_at(m);
    for (int64_t j = 0; j < lanes; j += 2 * kLanes<C>) {
      const int64_t width = width_at<C>(j, lanes);
      for_tiles(columns, [&](int64_t i, int rows) {
        multiply_panel<C, false>(rows, from.data + i * from.stride, from.stride, packed + j * d, width, d, width, to + i * kBlockRows + j,
                                 kBlockRows, false);
      });
    }
  }
};

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

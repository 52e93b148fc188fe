// Tiles of bounded distillation from features, one instruction set: anchors, logits and their exponentials; see bounded.h.
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
    partial = reinterpret_cast<double*>(rest);
  }

  static int64_t bytes(const FeatureProblem& p) {
    const int64_t columns = whole<C>(p.d) + whole<C>(p.d_t) + 2 * kLanes<C> + (3 + p.K) * kBlockRows;
    return (columns * kBlockColumns + rest_elements(p)) * static_cast<int64_t>(sizeof(C)) + 7 * 64;
  }

  // Partial sums of the columns, as many bytes in fp64 as a Vec<C> each, or a block of rows of the student.
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
  double* partial;  // the same memory

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

}  // namespace
}  // namespace clk

// The sums of bounded distillation over the rows and columns of a task, one instruction set; see bounded.h for which.
#pragma once

#include <algorithm>

#include "distill_kl/bounded_tiles.h"

namespace clk {
namespace {

// Parts of a Vec<C> in fp64.
template <typename C>
constexpr int kParts = sizeof(double) / sizeof(C);

inline void in_double(Vec<double> v, Vec<double>* parts) { parts[0] = v; }

inline void in_double(Vec<float> v, Vec<double>* parts) {
  typedef float Part __attribute__((vector_size(kVectorBytes / 2)));
  Part halves[2];
  std::memcpy(halves, &v, sizeof(v));
  for (int i = 0; i < 2; ++i) parts[i] = __builtin_convertvector(halves[i], Vec<double>);
}

inline void add_to(double* to, Vec<double> v) { store_vector(to, load_vector(to) + v); }

// Sums of one student tile: down the columns into `rows`, across the lanes into vectors of partial sums, one for each column.
//
// In fp64, here and for the teachers: where one entry has nearly all the probability, the loss is a small difference between the
// logarithm of one sum and the quotient of two others, all of them as large as the logits.
template <typename C, int U>
inline void student_sums(const C* e, int64_t step, int64_t columns, double* rows, double* across) {
  constexpr int W = kLanes<C>, D = kLanes<double>, P = kParts<C>;
  Vec<double> down[U * P] = {};
  for (int64_t i = 0; i < columns; ++i) {
    Vec<double> sum{};
    for (int u = 0; u < U; ++u) {
      Vec<double> value[P];
      in_double(load_vector(e + i * step + u * W), value);
      for (int q = 0; q < P; ++q) {
        down[u * P + q] += value[q];
        sum += value[q];
      }
    }
    add_to(across + i * D, sum);
  }
  for (int v = 0; v < U * P; ++v) add_to(rows + v * D, down[v]);
}

// The same for one teacher: Σ e, Σ e y of the rows, `next` apart; Σ e, Σ w e, Σ w e y of the columns.
template <typename C, int U, bool WEIGHTED, bool KL>
inline void teacher_sums(const C* e, const C* power, const C* student_power, const C* weight, int64_t step, int64_t columns,
                         double* rows, int64_t next, double* across) {
  constexpr int W = kLanes<C>, D = kLanes<double>, P = kParts<C>;
  Vec<double> down[U * P] = {}, down_y[U * P] = {}, w[U * P];
  for (int u = 0; u < U; ++u) in_double(load_vector(weight + u * W), w + u * P);
  double *across_w = across + kBlockColumns * D, *across_y = across_w + kBlockColumns * D;
  for (int64_t i = 0; i < columns; ++i) {
    Vec<double> sum{}, sum_w{}, sum_y{};
    for (int u = 0; u < U; ++u) {
      Vec<double> value[P], y[P], of_teacher[P] = {};
      in_double(load_vector(e + i * step + u * W), value);
      in_double(load_vector(student_power + i * kBlockRows + u * W), y);
      if (KL) in_double(load_vector(power + i * kBlockRows + u * W), of_teacher);
      for (int q = 0; q < P; ++q) {
        const int v = u * P + q;
        const Vec<double> product = value[q] * (KL ? y[q] - of_teacher[q] : y[q]);
        down[v] += value[q];
        down_y[v] += product;
        sum += value[q];
        sum_y += WEIGHTED ? product * w[v] : product;
        if (WEIGHTED) sum_w += value[q] * w[v];
      }
    }
    add_to(across + i * D, sum);
    if (WEIGHTED) add_to(across_w + i * D, sum_w);
    add_to(across_y + i * D, sum_y);
  }
  for (int v = 0; v < U * P; ++v) {
    add_to(rows + v * D, down[v]);
    add_to(rows + next + v * D, down_y[v]);
  }
}

template <typename C, typename T, int U>
inline void add_sums(const BoundedTiles<C, T>& tiles, int64_t block, int64_t m, int64_t v, int64_t slot, const BoundedSums& sums) {
  constexpr int64_t numbers = kBlockColumns * kLanes<double>;
  const FeatureProblem& p = tiles.p;
  const int64_t columns = tiles.columns_at(m), n = block * kBlockRows + v, next = p.N_padded;
  const C* e = tiles.tile(block, m) + slot * kBlockRows + v;
  if (slot == 0) return student_sums<C, U>(e, tiles.step, columns, sums.rows + n, tiles.partial);
  const C* weight = static_cast<const C*>(p.weight) + (slot - 1) * next + n;
  const auto run = tiles.b.weighted ? (p.kl ? teacher_sums<C, U, true, true> : teacher_sums<C, U, true, false>)
                                    : (p.kl ? teacher_sums<C, U, false, true> : teacher_sums<C, U, false, false>);
  run(e, tiles.teacher_power + v, tiles.student_power + v, weight, tiles.step, columns, sums.rows + (2 * slot - 1) * next + n, next,
      tiles.partial + (3 * slot - 2) * numbers);
}

template <typename C, typename T>
inline bool sums_task(const BoundedProblem& b, const BoundedTask& task, const BoundedSums& sums) {
  constexpr int64_t W = kLanes<C>, D = kLanes<double>;
  const FeatureProblem& p = *b.features;
  BoundedTiles<C, T> tiles(b, task);
  const int64_t vectors = (1 + 3 * p.K) * kBlockColumns;
  for (int64_t m = task.m0; m < task.m1; m += kBlockColumns) {
    tiles.load_anchors(m, false);
    std::fill(tiles.partial, tiles.partial + vectors * D, 0.0);
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
        sums.columns[s * p.M + m + i] = sum_lanes<double>(load_vector(tiles.partial + (from * kBlockColumns + i) * D));
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace clk

// Distillation from bounded logits, one instruction set: one read of the logits forward, one read and one write backward.
//
// As in bounded.h: exponentials of bounded logits need no maximum. Whatever is out of bounds, masked with -inf or NaN returns false and
// goes through logits.h instead, slice by slice.
#pragma once

#include "common/convert.h"
#include "distill_kl/bounded.h"
#include "distill_kl/power.h"

namespace clk {
namespace {

constexpr int64_t kFlush = 64;  // vectors whose sums stay in the compute type before they go into fp64

// Sums of V slices per lane, or of V parts of the same slice.
//
// y is measured from the student's largest logit, for the divergence less the teacher's from its own. Measured from 0, Σ e_t y of a slice
// in which one entry has nearly all the probability would be rounded by as much as the loss itself.
template <typename C, int V>
struct PowerSums {
  Vec<C> student[V] = {}, teacher[V] = {}, y[V] = {};

  template <bool KL>
  void add(int v, Vec<C> zs, Vec<C> zt, Vec<C> keep, Vec<C> top_s, Vec<C> top_t) {
    const Vec<C> e = power_of_two(zt) * keep;
    student[v] += power_of_two(zs) * keep;
    teacher[v] += e;
    y[v] += e * (KL ? (zs - top_s) - (zt - top_t) : zs - top_s);
  }
};

// A logarithm as a whole number and what is left, which keeps its digits. The rest is negative: that tells the backward pass which way
// the statistics came about, because the logarithm of a sum whose largest term is 1 is not.
template <typename C>
inline void write_logarithm(double x, C* whole, C* rest) {
  *whole = static_cast<C>(::floor(x) + 1);
  *rest = static_cast<C>(x - (::floor(x) + 1));
}

template <typename C>
inline bool was_bounded(const LogitsProblem& p, int64_t slice) {
  return static_cast<const C*>(p.stats)[p.slices + slice] < 0;
}

// Loss and statistics of a slice from Σ e_s, Σ e_t and Σ e_t y.
template <typename C>
inline void write_sums(const LogitsProblem& p, int64_t slice, double student, double teacher, double y) {
  const double log_s = ::log(student), log_t = ::log(teacher);
  const double loss = log_s - (p.kl ? log_t : 0) - 0.6931471805599453 * y / teacher;
  static_cast<C*>(p.loss)[slice] = static_cast<C>(p.temperature * p.temperature * loss);
  C* stats = static_cast<C*>(p.stats) + slice;
  write_logarithm(log_s, stats, stats + p.slices);
  write_logarithm(log_t, stats + 2 * p.slices, stats + 3 * p.slices);
}

template <typename C>
inline C powers_per_logit(const LogitsProblem& p) {
  return static_cast<C>(1.4426950408889634 / p.temperature);
}

// The vector behind `from`, `n` of whose lanes exist; the others repeat the first.
template <typename C, typename T>
inline Vec<C> first_lanes(const T* from, int64_t n) {
  Vec<C> v = splat<C>(load(from));
  for (int64_t i = 1; i < n; ++i) v[i] = load(from + i);
  return v;
}

// The largest of `n` steps in every lane, times `factor`.
template <typename C, typename T>
inline Vec<C> tops_of(const T* from, int64_t n, int64_t stride, C factor) {
  Vec<C> top = load_vector(from) * factor;
  for (int64_t i = 1; i < n; ++i) top = larger(load_vector(from + i * stride) * factor, top);
  return top;
}

// The largest of [start, end) of a slice, times `factor`.
template <typename C, typename T>
inline C top_of(const T* slice, int64_t start, int64_t end, C factor) {
  constexpr int64_t W = kLanes<C>;
  const int64_t whole = (end - start) / W, left = (end - start) % W;
  const T* last = slice + end - left;
  Vec<C> top = left ? first_lanes<C>(last, left) * factor : splat(-std::numeric_limits<C>::infinity());
  if (whole) top = larger(tops_of<C>(slice + start, whole, W, factor), top);
  return max_lanes<C>(top);
}

template <typename C>
inline Vec<C> keep_lanes(int64_t n) {
  Vec<C> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = 1;
  return v;
}

// inner == 1: a slice is contiguous.
template <typename C, typename T, bool KL>
inline bool bounded_slice(const LogitsProblem& p, int64_t slice) {
  constexpr int64_t W = kLanes<C>, chunk = kFlush * 2 * W;
  const T* s = static_cast<const T*>(p.student.data) + slice * p.student.outer;
  const T* t = static_cast<const T*>(p.teacher.data) + slice * p.teacher.outer;
  const C factor = powers_per_logit<C>(p);
  const Vec<C> all = splat<C>(1);
  double student = 0, teacher = 0, y = 0;
  Magnitude<C> most;
  for (int64_t start = 0; start < p.M; start += chunk) {
    const int64_t end = p.M - start < chunk ? p.M : start + chunk;
    const C top_s = top_of<C>(s, start, end, factor), top_t = KL ? top_of<C>(t, start, end, factor) : 0;
    const Vec<C> from_s = splat(top_s), from_t = splat(top_t);
    PowerSums<C, 2> sums;
    const auto step = [&](int v, Vec<C> zs, Vec<C> zt, Vec<C> keep) {
      zs *= factor;
      zt *= factor;
      most.see(zs);
      most.see(zt);
      sums.template add<KL>(v, zs, zt, keep, from_s, from_t);
    };
    int64_t i = start;
    for (; i + 2 * W <= end; i += 2 * W) {
      step(0, load_vector(s + i), load_vector(t + i), all);
      step(1, load_vector(s + i + W), load_vector(t + i + W), all);
    }
    for (; i < end; i += W) {
      const int64_t n = end - i < W ? end - i : W;
      step(0, first_lanes<C>(s + i, n), first_lanes<C>(t + i, n), keep_lanes<C>(n));
    }
    const double of_teacher = sum_lanes<C>(sums.teacher[0] + sums.teacher[1]);
    student += sum_lanes<C>(sums.student[0] + sums.student[1]);
    teacher += of_teacher;
    y += sum_lanes<C>(sums.y[0] + sums.y[1]) + (static_cast<double>(top_s) - static_cast<double>(top_t)) * of_teacher;
  }
  if (!most.within(static_cast<C>(kLargestPower))) return false;
  write_sums<C>(p, slice, student, teacher, y);
  return true;
}

// `width` >= kLanes neighbouring slices, V vectors at a time; where they do not divide evenly, the last vectors overlap.
template <typename C, typename T, bool KL, int V>
inline bool bounded_slices(const LogitsProblem& p, int64_t outer, int64_t inner, const int64_t* offsets) {
  constexpr int64_t W = kLanes<C>;
  const T* s = static_cast<const T*>(p.student.data) + outer * p.student.outer + inner;
  const T* t = static_cast<const T*>(p.teacher.data) + outer * p.teacher.outer + inner;
  const C factor = powers_per_logit<C>(p);
  const Vec<C> all = splat<C>(1);
  double totals[3][V * W] = {};
  Magnitude<C> most;
  for (int64_t start = 0; start < p.M; start += kFlush) {
    const int64_t end = p.M - start < kFlush ? p.M : start + kFlush;
    Vec<C> top_s[V], top_t[V] = {};
    for (int v = 0; v < V; ++v) {
      top_s[v] = tops_of<C>(s + start * p.student.step + offsets[v], end - start, p.student.step, factor);
      if (KL) top_t[v] = tops_of<C>(t + start * p.teacher.step + offsets[v], end - start, p.teacher.step, factor);
    }
    PowerSums<C, V> sums;
    for (int64_t m = start; m < end; ++m) {
      for (int v = 0; v < V; ++v) {
        const Vec<C> zs = load_vector(s + m * p.student.step + offsets[v]) * factor;
        const Vec<C> zt = load_vector(t + m * p.teacher.step + offsets[v]) * factor;
        most.see(zs);
        most.see(zt);
        sums.template add<KL>(v, zs, zt, all, top_s[v], top_t[v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int64_t i = 0; i < W; ++i) {
        const double of_teacher = sums.teacher[v][i];
        totals[0][v * W + i] += sums.student[v][i];
        totals[1][v * W + i] += of_teacher;
        totals[2][v * W + i] += sums.y[v][i] + (static_cast<double>(top_s[v][i]) - static_cast<double>(top_t[v][i])) * of_teacher;
      }
    }
  }
  if (!most.within(static_cast<C>(kLargestPower))) return false;
  for (int v = 0; v < V; ++v) {
    for (int64_t i = 0; i < W; ++i) {
      write_sums<C>(p, outer * p.inner + inner + offsets[v] + i, totals[0][v * W + i], totals[1][v * W + i], totals[2][v * W + i]);
    }
  }
  return true;
}

// Calls f(offsets, number) for groups of at most four vectors that cover `width` slices; false as soon as f says so.
template <typename C, typename F>
inline bool for_vectors(int64_t width, const F& f) {
  constexpr int64_t W = kLanes<C>;
  if (width < W) return false;
  const int64_t vectors = (width + W - 1) / W;
  for (int64_t first = 0; first < vectors; first += 4) {
    int64_t offsets[4], n = 0;
    for (; n < 4 && first + n < vectors; ++n) offsets[n] = (first + n + 1) * W > width ? width - W : (first + n) * W;
    const bool fine = n == 4 ? f(offsets, std::integral_constant<int, 4>()) : n == 3 ? f(offsets, std::integral_constant<int, 3>())
                      : n == 2 ? f(offsets, std::integral_constant<int, 2>()) : f(offsets, std::integral_constant<int, 1>());
    if (!fine) return false;
  }
  return true;
}

template <typename C, typename T, bool KL>
inline bool bounded_forward_block(const LogitsProblem& p, int64_t outer, int64_t inner, int64_t width) {
  return for_vectors<C>(width, [&](const int64_t* offsets, auto n) {
    return bounded_slices<C, T, KL, decltype(n)::value>(p, outer, inner, offsets);
  });
}

// T grad / Σ exp of a slice.
template <typename C>
inline C softmax_factor(const LogitsProblem& p, int64_t slice, const C* max, const C* log_sum) {
  const double total = static_cast<double>(max[slice]) + static_cast<double>(log_sum[slice]);
  return static_cast<C>(p.temperature * static_cast<const C*>(p.grad)[slice] * ::exp(-total));
}

// A chunk of the gradient of one slice to `to`; false, with anything written there, if a logit is out of bounds.
template <typename C, typename T>
inline bool bounded_gradient_chunk(const LogitsProblem& p, int64_t slice, int64_t start, int64_t n, C of_student, C of_teacher, T* to) {
  constexpr int64_t W = kLanes<C>;
  const T* s = static_cast<const T*>(p.student.data) + slice * p.student.outer + start;
  const T* t = static_cast<const T*>(p.teacher.data) + slice * p.teacher.outer + start;
  const C factor = powers_per_logit<C>(p);
  Magnitude<C> most;
  const auto gradient = [&](Vec<C> zs, Vec<C> zt) {
    zs *= factor;
    zt *= factor;
    most.see(zs);
    most.see(zt);
    return of_student * power_of_two(zs) - of_teacher * power_of_two(zt);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) store_vector(to + i, gradient(load_vector(s + i), load_vector(t + i)));
  if (i < n) {
    const Vec<C> g = gradient(first_lanes<C>(s + i, n - i), first_lanes<C>(t + i, n - i));
    for (int64_t j = i; j < n; ++j) store(to + j, g[j - i]);
  }
  return most.within(static_cast<C>(kLargestPower));
}

// The gradient of `width` neighbouring slices at step m to `to`; false as above. The factors are those of the slices.
template <typename C, typename T>
inline bool bounded_gradient_row(const LogitsProblem& p, int64_t outer, int64_t inner, int64_t m, int64_t width, const C* of_student,
                                 const C* of_teacher, T* to) {
  constexpr int64_t W = kLanes<C>;
  const T* s = static_cast<const T*>(p.student.data) + outer * p.student.outer + m * p.student.step + inner;
  const T* t = static_cast<const T*>(p.teacher.data) + outer * p.teacher.outer + m * p.teacher.step + inner;
  const C factor = powers_per_logit<C>(p);
  Magnitude<C> most;
  for (int64_t v = 0; v < width; v += W) {
    const int64_t i = v + W > width ? width - W : v;
    const Vec<C> zs = load_vector(s + i) * factor, zt = load_vector(t + i) * factor;
    most.see(zs);
    most.see(zt);
    store_vector(to + i, load_vector(of_student + i) * power_of_two(zs) - load_vector(of_teacher + i) * power_of_two(zt));
  }
  return most.within(static_cast<C>(kLargestPower));
}

// Calls write(to) for `n` <= N elements of the gradient from `offset` on; where these are the student's logits, which write reads, by way
// of a buffer, whose content is taken over if write says so. Returns what write returns.
template <int64_t N, typename T, typename F>
inline bool write_gradient(const LogitsProblem& p, int64_t offset, int64_t n, const F& write) {
  T* to = static_cast<T*>(p.grad_student) + offset;
  if (p.grad_student != p.student.data) return write(to);
  T buffer[N];
  if (!write(buffer)) return false;
  std::memcpy(to, buffer, static_cast<size_t>(n) * sizeof(T));
  return true;
}

// f(T()) with the storage type of both sides where it computes as C, else false: types differ, or a softmax over one entry must be
// exactly 1, as differences from the maximum give it.
template <typename C, typename F>
inline bool with_storage(const LogitsProblem& p, const F& f) {
  if (p.student.dtype != p.teacher.dtype || p.M == 1) return false;
  if constexpr (std::is_same_v<C, double>) {
    return f(double());
  } else {
    switch (p.student.dtype) {
      case Dtype::f32: return f(float());
      case Dtype::bf16: return f(BFloat16());
      case Dtype::f16: return f(Half());
      default: return false;
    }
  }
}

}  // namespace
}  // namespace clk

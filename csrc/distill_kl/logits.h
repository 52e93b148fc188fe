// Distillation from any logits, one instruction set; bounded ones (logits_bounded.h) take a shorter way.
//
// inner == 1: a slice is contiguous, and every lane keeps the statistics of every kLanes-th element until the lanes are merged.
// Otherwise lanes are neighbouring slices. Logits pass through buffers that hold them in the compute type, divided by T.
#pragma once

#include "distill_kl/logits_bounded.h"
#include "distill_kl/online.h"

namespace clk {
namespace {

constexpr int64_t kBuffer = 2048;  // elements: a chunk of a slice, or kInnerBlock slices times 32 steps

template <typename C, typename T>
inline void convert(C* to, const T* from, int64_t n, C factor) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(load(from + i)) * factor;
}

template <typename C>
inline void fetch(C* to, const LogitsView& view, int64_t offset, int64_t n, C factor) {
  switch (view.dtype) {
    case Dtype::f32: return convert(to, static_cast<const float*>(view.data) + offset, n, factor);
    case Dtype::f64: return convert(to, static_cast<const double*>(view.data) + offset, n, factor);
    case Dtype::bf16: return convert(to, static_cast<const BFloat16*>(view.data) + offset, n, factor);
    case Dtype::f16: return convert(to, static_cast<const Half*>(view.data) + offset, n, factor);
  }
}

template <typename C>
inline void put(Dtype dtype, void* to, int64_t offset, const C* from, int64_t n) {
  switch (dtype) {
    case Dtype::f32: {
      for (int64_t i = 0; i < n; ++i) store(static_cast<float*>(to) + offset + i, static_cast<float>(from[i]));
      return;
    }
    case Dtype::f64: {
      for (int64_t i = 0; i < n; ++i) store(static_cast<double*>(to) + offset + i, static_cast<double>(from[i]));
      return;
    }
    case Dtype::bf16: {
      for (int64_t i = 0; i < n; ++i) store(static_cast<BFloat16*>(to) + offset + i, static_cast<float>(from[i]));
      return;
    }
    case Dtype::f16: {
      for (int64_t i = 0; i < n; ++i) store(static_cast<Half*>(to) + offset + i, static_cast<float>(from[i]));
      return;
    }
  }
}

template <typename C>
inline C logarithm(C x);
template <>
inline float logarithm(float x) { return ::logf(x); }
template <>
inline double logarithm(double x) { return ::log(x); }

template <typename C>
inline void write_loss(const LogitsProblem& p, int64_t slice, C m_s, C sum_s, C m_t, C sum_t, C cross, C entropy) {
  const C squared = static_cast<C>(p.temperature * p.temperature);
  C loss = logarithm(sum_s) - cross / sum_t;
  if (p.kl) loss += entropy / sum_t - logarithm(sum_t);
  static_cast<C*>(p.loss)[slice] = squared * loss;
  C* stats = static_cast<C*>(p.stats) + slice;
  stats[0] = m_s;
  stats[p.slices] = logarithm(sum_s);
  stats[2 * p.slices] = m_t;
  stats[3 * p.slices] = logarithm(sum_t);
}

template <typename C>
inline void forward_slice(const LogitsProblem& p, int64_t slice) {
  constexpr int W = kLanes<C>;
  if (with_storage<C>(p, [&](auto t) {
        return p.kl ? bounded_slice<C, decltype(t), true>(p, slice) : bounded_slice<C, decltype(t), false>(p, slice);
      })) {
    return;
  }
  const C factor = static_cast<C>(1 / p.temperature);
  C zs[kBuffer], zt[kBuffer];
  StudentState<C> s = empty_student<C>();
  TeacherState<C> t = empty_teacher<C>();
  for (int64_t start = 0; start < p.M; start += kBuffer) {
    const int64_t n = p.M - start < kBuffer ? p.M - start : kBuffer, steps = (n + W - 1) / W;
    fetch(zs, p.student, slice * p.student.outer + start, n, factor);
    fetch(zt, p.teacher, slice * p.teacher.outer + start, n, factor);
    for (int64_t i = n; i < steps * W; ++i) zs[i] = zt[i] = -kInfinity<C>;
    const Vec<C> move = update<C>(s, zs, steps, W);
    update<C>(t, s, move, zt, zs, steps, W);
  }
  const C m_s = max_lanes<C>(s.m), m_t = max_lanes<C>(t.m);
  const Vec<C> from_s = origin(splat(m_s)), from_t = origin(splat(m_t));
  const C sum_s = sum_lanes<C>(s.sum * exponential(s.m - from_s));
  const Vec<C> shrink = exponential(t.m - from_t);
  const Vec<C> cross = t.cross + t.sum * (origin(s.m) - from_s), entropy = t.entropy + t.sum * (origin(t.m) - from_t);
  const C total_cross = sum_lanes<C>(shrink == 0 ? Vec<C>{} : shrink * cross);
  const C total_entropy = sum_lanes<C>(shrink == 0 ? Vec<C>{} : shrink * entropy);
  write_loss<C>(p, slice, m_s, sum_s, m_t, sum_lanes<C>(t.sum * shrink), total_cross, total_entropy);
}

template <typename C>
inline void forward_block(const LogitsProblem& p, int64_t outer, int64_t inner, int64_t width) {
  constexpr int W = kLanes<C>, vectors = kInnerBlock / W;
  constexpr int64_t chunk = kBuffer / kInnerBlock;
  if (with_storage<C>(p, [&](auto t) {
        return p.kl ? bounded_forward_block<C, decltype(t), true>(p, outer, inner, width)
                    : bounded_forward_block<C, decltype(t), false>(p, outer, inner, width);
      })) {
    return;
  }
  const C factor = static_cast<C>(1 / p.temperature);
  C zs[kBuffer] = {}, zt[kBuffer] = {};
  StudentState<C> s[vectors];
  TeacherState<C> t[vectors];
  for (int v = 0; v < vectors; ++v) s[v] = empty_student<C>(), t[v] = empty_teacher<C>();
  for (int64_t start = 0; start < p.M; start += chunk) {
    const int64_t steps = p.M - start < chunk ? p.M - start : chunk;
    for (int64_t i = 0; i < steps; ++i) {
      fetch(zs + i * kInnerBlock, p.student, outer * p.student.outer + (start + i) * p.student.step + inner, width, factor);
      fetch(zt + i * kInnerBlock, p.teacher, outer * p.teacher.outer + (start + i) * p.teacher.step + inner, width, factor);
    }
    for (int v = 0; v * W < width; ++v) {
      const Vec<C> move = update<C>(s[v], zs + v * W, steps, kInnerBlock);
      update<C>(t[v], s[v], move, zt + v * W, zs + v * W, steps, kInnerBlock);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    const int v = static_cast<int>(i / W), lane = static_cast<int>(i % W);
    write_loss<C>(p, outer * p.inner + inner + i, s[v].m[lane], s[v].sum[lane], t[v].m[lane], t[v].sum[lane], t[v].cross[lane],
                  t[v].entropy[lane]);
  }
}

// z becomes exp((z - max) - log(sum)); the statistics of neighbours are `neighbour` (0 or 1) apart.
template <typename C>
inline void softmax(C* z, const C* max, const C* log_sum, int64_t n, int neighbour) {
  constexpr int W = kLanes<C>;
  for (int64_t i = 0; i < n; i += W) {
    const Vec<C> m = neighbour ? load_vector(max + i) : splat(*max);
    const Vec<C> l = neighbour ? load_vector(log_sum + i) : splat(*log_sum);
    store_vector(z + i, exponential((load_vector(z + i) - m) - l));
  }
}

template <typename C>
inline void backward_slice(const LogitsProblem& p, int64_t slice) {
  const C inverse = static_cast<C>(1 / p.temperature);
  const C factor = static_cast<C>(p.temperature) * static_cast<const C*>(p.grad)[slice];
  const C *max_s = static_cast<const C*>(p.stats) + slice, *max_t = max_s + 2 * p.slices;
  const C of_student = softmax_factor<C>(p, slice, static_cast<const C*>(p.stats), static_cast<const C*>(p.stats) + p.slices);
  const C of_teacher = softmax_factor<C>(p, slice, static_cast<const C*>(p.stats) + 2 * p.slices, static_cast<const C*>(p.stats) + 3 * p.slices);
  // As the statistics came about: the two ways round the logits differently, by as much as they are large.
  const bool bounded = was_bounded<C>(p, slice);
  C zs[kBuffer], zt[kBuffer];
  for (int64_t start = 0; start < p.M; start += kBuffer) {
    const int64_t n = p.M - start < kBuffer ? p.M - start : kBuffer;
    if (bounded && with_storage<C>(p, [&](auto t) {
          using T = decltype(t);
          return write_gradient<kBuffer, T>(p, slice * p.M + start, n, [&](T* to) {
            return bounded_gradient_chunk<C, T>(p, slice, start, n, of_student, of_teacher, to);
          });
        })) {
      continue;
    }
    for (int64_t i = n; i < kBuffer && i < n + kLanes<C>; ++i) zs[i] = zt[i] = 0;
    fetch(zs, p.student, slice * p.student.outer + start, n, inverse);
    fetch(zt, p.teacher, slice * p.teacher.outer + start, n, inverse);
    softmax<C>(zs, max_s, max_s + p.slices, n, 0);
    softmax<C>(zt, max_t, max_t + p.slices, n, 0);
    for (int64_t i = 0; i < n; ++i) zs[i] = factor * (zs[i] - zt[i]);
    put(p.student.dtype, p.grad_student, slice * p.M + start, zs, n);
  }
}

template <typename C>
inline void backward_block(const LogitsProblem& p, int64_t outer, int64_t inner, int64_t width) {
  const C inverse = static_cast<C>(1 / p.temperature);
  const int64_t first = outer * p.inner + inner;
  C zs[kInnerBlock] = {}, zt[kInnerBlock] = {}, factor[kInnerBlock] = {}, stats[4 * kInnerBlock] = {};
  C of_student[kInnerBlock], of_teacher[kInnerBlock];
  bool bounded = width >= kLanes<C>;
  for (int64_t i = 0; i < width; ++i) {
    for (int s = 0; s < 4; ++s) stats[s * kInnerBlock + i] = static_cast<const C*>(p.stats)[s * p.slices + first + i];
    factor[i] = static_cast<C>(p.temperature) * static_cast<const C*>(p.grad)[first + i];
    const C* all = static_cast<const C*>(p.stats);
    bounded &= was_bounded<C>(p, first + i);
    of_student[i] = softmax_factor<C>(p, first + i, all, all + p.slices);
    of_teacher[i] = softmax_factor<C>(p, first + i, all + 2 * p.slices, all + 3 * p.slices);
  }
  for (int64_t m = 0; m < p.M; ++m) {
    if (bounded && with_storage<C>(p, [&](auto t) {
          using T = decltype(t);
          return write_gradient<kInnerBlock, T>(p, (outer * p.M + m) * p.inner + inner, width, [&](T* to) {
            return bounded_gradient_row<C, T>(p, outer, inner, m, width, of_student, of_teacher, to);
          });
        })) {
      continue;
    }
    fetch(zs, p.student, outer * p.student.outer + m * p.student.step + inner, width, inverse);
    fetch(zt, p.teacher, outer * p.teacher.outer + m * p.teacher.step + inner, width, inverse);
    softmax<C>(zs, stats, stats + kInnerBlock, width, 1);
    softmax<C>(zt, stats + 2 * kInnerBlock, stats + 3 * kInnerBlock, width, 1);
    for (int64_t i = 0; i < width; ++i) zs[i] = factor[i] * (zs[i] - zt[i]);
    put(p.student.dtype, p.grad_student, (outer * p.M + m) * p.inner + inner, zs, width);
  }
}

// Units [begin, end): slices where inner == 1, otherwise blocks of kInnerBlock slices within one outer index.
template <typename C>
inline void run_logits(const LogitsProblem& p, int64_t begin, int64_t end, bool backward) {
  const int64_t blocks = (p.inner + kInnerBlock - 1) / kInnerBlock;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (p.inner == 1) {
      backward ? backward_slice<C>(p, unit) : forward_slice<C>(p, unit);
    } else {
      const int64_t outer = unit / blocks, inner = unit % blocks * kInnerBlock;
      const int64_t width = p.inner - inner < kInnerBlock ? p.inner - inner : kInnerBlock;
      backward ? backward_block<C>(p, outer, inner, width) : forward_block<C>(p, outer, inner, width);
    }
  }
}

}  // namespace
}  // namespace clk

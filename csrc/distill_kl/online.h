// Running statistics of a teacher and a student softmax, one softmax per vector lane; see cpu_kernels.h for their meaning.
//
// Maxima start at -inf. A maximum that still is -inf counts as 0 when something is measured from it, so that no difference of
// infinities appears; the products with e_t = 0 are cut, so that logits that are -inf on both sides drop out.
#pragma once

#include "common/vector.h"

namespace clk {
namespace {

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

inline Vec<float> origin(Vec<float> maximum) { return maximum == -kInfinity<float> ? Vec<float>{} : maximum; }
inline Vec<double> origin(Vec<double> maximum) { return maximum == -kInfinity<double> ? Vec<double>{} : maximum; }

template <typename C>
struct StudentState {
  Vec<C> m, sum;
};

template <typename C>
struct TeacherState {
  Vec<C> m, sum, cross, entropy;  // cross is measured from the student's maximum, entropy from the teacher's
};

template <typename C>
inline StudentState<C> empty_student() {
  return {splat(-kInfinity<C>), Vec<C>{}};
}

template <typename C>
inline TeacherState<C> empty_teacher() {
  return {splat(-kInfinity<C>), Vec<C>{}, Vec<C>{}, Vec<C>{}};
}

template <typename C>
inline Vec<C> max_of(Vec<C> m, const C* z, int64_t steps, int64_t stride) {
  for (int64_t i = 0; i < steps; ++i) m = larger(load_vector(z + i * stride), m);
  return m;
}

// Takes in `steps` vectors of student logits; returns how far the origin of the cross terms moved.
template <typename C>
inline Vec<C> update(StudentState<C>& s, const C* z, int64_t steps, int64_t stride) {
  const Vec<C> m = max_of(s.m, z, steps, stride), from = origin(m);
  Vec<C> sum{};
  for (int64_t i = 0; i < steps; ++i) sum += exponential(load_vector(z + i * stride) - from);
  const Vec<C> move = origin(s.m) - from;
  s.sum = s.sum * exponential(s.m - from) + sum;
  s.m = m;
  return move;
}

// Takes in `steps` vectors of teacher logits with the student's logits there; the student's state is already updated, by `move`.
template <typename C>
inline void update(TeacherState<C>& t, const StudentState<C>& s, Vec<C> move, const C* zt, const C* zs, int64_t steps,
                   int64_t stride) {
  const Vec<C> m = max_of(t.m, zt, steps, stride), from = origin(m), from_s = origin(s.m);
  Vec<C> sum{}, cross{}, entropy{};
  for (int64_t i = 0; i < steps; ++i) {
    const Vec<C> z = load_vector(zt + i * stride) - from;
    const Vec<C> e = exponential(z);
    sum += e;
    cross += e == 0 ? Vec<C>{} : e * (load_vector(zs + i * stride) - from_s);
    entropy += e == 0 ? Vec<C>{} : e * z;
  }
  const Vec<C> shrink = exponential(t.m - from);
  t.cross = (shrink == 0 ? Vec<C>{} : shrink * (t.cross + t.sum * move)) + cross;
  t.entropy = (shrink == 0 ? Vec<C>{} : shrink * (t.entropy + t.sum * (origin(t.m) - from))) + entropy;
  t.sum = t.sum * shrink + sum;
  t.m = m;
}

}  // namespace
}  // namespace clk

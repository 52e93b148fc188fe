// Vectors as wide as the registers of the instruction set that a file is compiled for, and the exponential on them.
//
// GCC and Clang vector extensions: the same source serves SSE2, AVX2, AVX-512 and other machines. Everything has internal linkage,
// so that per-instruction-set files may include it (see common/isa.h).
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace clk {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename C>
struct Vector {
  typedef C type __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / sizeof(C);
};

template <typename C>
using Vec = typename Vector<C>::type;

// Elements of a Vec<C>.
template <typename C>
constexpr int kLanes = Vector<C>::width;

template <typename C>
inline Vec<C> load_vector(const C* p) {
  Vec<C> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename C>
inline void store_vector(C* p, Vec<C> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <typename C>
inline Vec<C> splat(C value) {
  return Vec<C>{} + value;
}

// A NaN in a is dropped, one in b is kept.
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// Sum of the lanes, in a fixed order that halves the vector step by step.
template <typename C>
inline C sum_lanes(Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <typename C>
inline C max_lanes(Vec<C> v) {
  C lanes[kLanes<C>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// e^x within 2 units in the last place, subnormal results included; infinities and NaN as libm.
//
// x = n ln 2 + r with |r| <= ln(2)/2; e^r from a polynomial fitted to that interval; the result is scaled by 2^n in two steps, so that
// neither factor leaves the normal range.
inline Vec<float> exponential(Vec<float> x) {
  using I = Vec<int32_t>;
  x = x < -104.0f ? splat(-104.0f) : x;
  x = x > 89.0f ? splat(89.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec<float> shifted = x * 1.44269504f + round;
  const Vec<float> n = shifted - round;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 0.001381453825160861f + 0.00836874544620514f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = (p * r) * r + r + 1.0f;
  I exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent -= 0x4b400000;  // the bits of `round`
  const I low = exponent >> 1;
  const I high = exponent - low;
  const I low_bits = (low + 127) << 23;
  const I high_bits = (high + 127) << 23;
  Vec<float> low_factor, high_factor;
  std::memcpy(&low_factor, &low_bits, sizeof(low_bits));
  std::memcpy(&high_factor, &high_bits, sizeof(high_bits));
  return (p * low_factor) * high_factor;
}

inline Vec<double> exponential(Vec<double> x) {
  double lanes[kLanes<double>];
  std::memcpy(lanes, &x, sizeof(x));
  for (double& lane : lanes) lane = ::exp(lane);
  std::memcpy(&x, lanes, sizeof(x));
  return x;
}

inline float exponential(float x) { return ::expf(x); }
inline double exponential(double x) { return ::exp(x); }

}  // namespace
}  // namespace clk

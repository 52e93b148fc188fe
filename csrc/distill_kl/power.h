// Powers of two and transposes on vectors, for the bounded kernels. Everything has internal linkage.
#pragma once

#include <utility>

#include "common/vector.h"

namespace clk {
namespace {

template <typename C>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};
template <typename C>
using IntVec = Vec<typename Bits<C>::type>;

// 2^x for |x| <= 120 (anything beyond is undefined) within 1e-7: x = n + r with |r| <= 1/2, 2^r from a polynomial fitted to the
// relative error there, n added to its exponent.
inline Vec<float> power_of_two(Vec<float> x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec<float> shifted = x + round, r = x - (shifted - round);
  Vec<float> p = r * 1.5594677824992687e-4f + 1.3406643411144614e-3f;
  p = p * r + 9.617692790925503e-3f;
  p = p * r + 5.5503103882074356e-2f;
  p = p * r + 0.24022652208805084f;
  p = p * r + 0.6931472420692444f;
  p = p * r + 1.0f;
  IntVec<float> n, bits;
  std::memcpy(&n, &shifted, sizeof(n));
  std::memcpy(&bits, &p, sizeof(bits));
  bits += n << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

inline Vec<double> power_of_two(Vec<double> x) {
  double lanes[kLanes<double>];
  std::memcpy(lanes, &x, sizeof(x));
  for (double& lane : lanes) lane = ::exp2(lane);
  std::memcpy(&x, lanes, sizeof(x));
  return x;
}

// Largest magnitude seen, as bits: unlike a maximum of numbers it keeps infinities and NaN.
template <typename C>
struct Magnitude {
  using I = typename Bits<C>::type;
  IntVec<C> bits{};

  void see(Vec<C> x) {
    IntVec<C> b;
    std::memcpy(&b, &x, sizeof(b));
    b &= std::numeric_limits<I>::max();
    bits = b > bits ? b : bits;
  }

  bool within(C limit) const {
    I lanes[kLanes<C>], most;
    std::memcpy(lanes, &bits, sizeof(bits));
    std::memcpy(&most, &limit, sizeof(most));
    bool inside = true;
    for (I lane : lanes) inside &= lane <= most;
    return inside;
  }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CLK_SHUFFLE 1
#endif
#endif

// One step of a transpose by perfect shuffles: kLanes vectors in, their halves interleaved out.
template <typename C, int... I>
inline void interleave(const Vec<C>* in, Vec<C>* out, std::integer_sequence<int, I...>) {
  constexpr int W = kLanes<C>;
#if defined(CLK_SHUFFLE)
#pragma GCC unroll 16
  for (int i = 0; i < W / 2; ++i) {
    out[2 * i] = __builtin_shufflevector(in[i], in[i + W / 2], (I % 2 ? W + I / 2 : I / 2)...);
    out[2 * i + 1] = __builtin_shufflevector(in[i], in[i + W / 2], (I % 2 ? W + W / 2 + I / 2 : W / 2 + I / 2)...);
  }
#else
  for (int i = 0; i < W / 2; ++i) {
    for (int j = 0; j < W; ++j) {
      out[2 * i][j] = in[i + j % 2 * (W / 2)][j / 2];
      out[2 * i + 1][j] = in[i + j % 2 * (W / 2)][W / 2 + j / 2];
    }
  }
#endif
}

// rows[i][j] becomes rows[j][i].
template <typename C>
inline void transpose(Vec<C>* rows) {
  constexpr int W = kLanes<C>;
  Vec<C> other[W];
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for (int done = 1; done < W; done *= 2) {
    interleave<C>(rows, other, lanes);
    for (int i = 0; i < W; ++i) rows[i] = other[i];
  }
}

}  // namespace
}  // namespace clk

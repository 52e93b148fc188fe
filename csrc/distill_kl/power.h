// Powers of two on vectors, for the bounded kernels. Everything has internal linkage.
#pragma once

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
  Vec<uint32_t> n, bits;  // unsigned: out of range, where nobody uses the result, the sum wraps
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

}  // namespace
}  // namespace clk

// Stochastic rounding to 16 bits, for per-instruction-set files: internal linkage.
//
// A number between two that the type can hold becomes the upper with the probability of its share of the way, so that the expected
// value is exact and a sum of small changes is not lost. 16 random bits an element, from the whole words of Philox-4x32-10.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "common/scalar.h"
#include "weight_average/counters.h"

namespace clk {
namespace {

// N random 16-bit numbers from counters `counter`, `counter` + 1, … under key `seed`.
template <int64_t N>
void random_bits(uint64_t seed, uint64_t counter, uint16_t* __restrict out) {
  constexpr int64_t kGroup = kPhiloxLanes * kElementsPerCounter;
  static_assert(N % kGroup == 0, "whole groups of counters");
  uint32_t words[4][kPhiloxLanes];
  for (int64_t start = 0; start < N; start += kGroup, counter += kPhiloxLanes) {
    philox(seed, counter, words);
    uint32_t ordered[4 * kPhiloxLanes];
    for (int i = 0; i < kPhiloxLanes; ++i) {
      for (int w = 0; w < 4; ++w) ordered[4 * i + w] = words[w][i];
    }
    for (int i = 0; i < 4 * kPhiloxLanes; ++i) {
      out[start + 2 * i] = static_cast<uint16_t>(ordered[i]);
      out[start + 2 * i + 1] = static_cast<uint16_t>(ordered[i] >> 16);
    }
  }
}

// Adding below the last digit that is kept and cutting off carries with the right probability; infinities stay, as does NaN.
inline void store_stochastic(BFloat16* p, float value, uint16_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  p->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + random) >> 16);
}

inline void store_stochastic(Half* p, float value, uint16_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const uint32_t cut = (magnitude + (random >> 3)) & 0xffffe000u;
  float normal, absolute;
  std::memcpy(&normal, &cut, sizeof(normal));
  std::memcpy(&absolute, &magnitude, sizeof(absolute));
  // Below 2^-14 the digits of a half are multiples of 2^-24.
  const float scaled = (absolute < 6.103515625e-5f ? absolute : 0.0f) * 16777216.0f + static_cast<float>(random) * 1.52587890625e-5f;
  const float subnormal = static_cast<float>(static_cast<int32_t>(scaled)) * 5.9604644775390625e-8f;
  float rounded = absolute < 6.103515625e-5f ? subnormal : normal;
  rounded = value != value ? value : rounded;
  uint32_t result;
  std::memcpy(&result, &rounded, sizeof(result));
  result |= sign;
  std::memcpy(&rounded, &result, sizeof(rounded));
  store(p, rounded);
}

}  // namespace
}  // namespace clk

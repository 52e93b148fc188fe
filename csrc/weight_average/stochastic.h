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

// N random 16-bit numbers, the halves of the words of counters `counter`, `counter` + 1, … under key `seed`, lower half first.
template <int64_t N>
inline void random_bits(uint64_t seed, uint64_t counter, uint16_t* out) {
  static_assert(N % (2 * kPhiloxWords) == 0, "whole groups of counters");
  static_assert(2 * kPhiloxWords == kPhiloxCounters * kElementsPerCounter, "eight elements from a counter");
  uint32_t words[kPhiloxWords];
  for (int64_t start = 0; start < N; start += 2 * kPhiloxWords, counter += kPhiloxCounters) {
    philox(seed, counter, words);
    for (int i = 0; i < kPhiloxWords; ++i) {
      out[start + 2 * i] = static_cast<uint16_t>(words[i]);
      out[start + 2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
}

// What a BFloat16 can hold, as its bits. Adding below the last digit that is kept and cutting off carries with the right
// probability; infinities stay, and so does NaN.
inline uint16_t round_to_bfloat16(float value, uint16_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + random) >> 16);
}

// What a Half can hold, as float. Without branches, so that loops over it vectorise.
inline float round_to_half(float value, uint16_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const bool small = magnitude < 0x38800000u;  // below 2^-14 the digits of a half are multiples of 2^-24
  const uint32_t normal = (magnitude + (static_cast<uint32_t>(random) >> 3)) & 0xffffe000u;
  const uint32_t scalable = small ? magnitude : 0u;
  float scaled;
  std::memcpy(&scaled, &scalable, sizeof(scaled));
  scaled = scaled * 16777216.0f + static_cast<float>(static_cast<int32_t>(random)) * 1.52587890625e-5f;
  const float subnormal = static_cast<float>(static_cast<int32_t>(scaled)) * 5.9604644775390625e-8f;
  uint32_t result;
  std::memcpy(&result, &subnormal, sizeof(result));
  result = magnitude > 0x7f800000u ? bits : (small ? result : normal) | sign;
  float rounded;
  std::memcpy(&rounded, &result, sizeof(rounded));
  return rounded;
}

}  // namespace
}  // namespace clk

// Stochastic rounding to 16 bits, for per-instruction-set files: internal linkage.
//
// A number between two that the type can hold becomes the upper with the probability of its share of the way, so that the expected
// value is exact and a sum of small changes is not lost. 16 random bits an element, from the whole words of Philox-4x32-10.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/philox.h"
#include "common/scalar.h"
#include "weight_average/counters.h"

namespace clk {
namespace {

#if defined(__AVX2__)

// Four counters, each word in the lower half of a 64-bit lane; what the upper halves hold never matters, because products ignore it.
struct PhiloxLanes {
  __m256i c0, c1, c2, c3;

  explicit PhiloxLanes(uint64_t counter)
      : c0(_mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), _mm256_setr_epi64x(0, 1, 2, 3))),
        c1(_mm256_srli_epi64(c0, 32)),
        c2(_mm256_setzero_si256()),
        c3(_mm256_setzero_si256()) {}

  void round(__m256i k0, __m256i k1) {
    const __m256i first = _mm256_mul_epu32(c0, _mm256_set1_epi64x(0xD2511F53));
    const __m256i second = _mm256_mul_epu32(c2, _mm256_set1_epi64x(0xCD9E8D57));
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), c1), k0);
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), c3), k1);
    c1 = second;
    c3 = first;
  }

  // Counter after counter, each with its words in order.
  void store(uint16_t* out) const {
    const __m256i front = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i back = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(front, back), odd = _mm256_unpackhi_epi64(front, back);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

// N random 16-bit numbers from counters `counter`, `counter` + 1, … under key `seed`.
template <int64_t N>
inline void random_bits(uint64_t seed, uint64_t counter, uint16_t* out) {
  static_assert(N % 64 == 0, "two vectors of counters at a time, whose chains of products overlap");
  for (int64_t start = 0; start < N; start += 64, counter += 8) {
    PhiloxLanes left(counter), right(counter + 4);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      left.round(key0, key1);
      right.round(key0, key1);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    left.store(out + start);
    right.store(out + start + 32);
  }
}

#else

template <int64_t N>
inline void random_bits(uint64_t seed, uint64_t counter, uint16_t* out) {
  constexpr int64_t kGroup = kPhiloxLanes * kElementsPerCounter;
  static_assert(N % kGroup == 0, "whole groups of counters");
  uint32_t words[4][kPhiloxLanes];
  for (int64_t start = 0; start < N; start += kGroup, counter += kPhiloxLanes) {
    philox(seed, counter, words);
    for (int i = 0; i < kPhiloxLanes; ++i) {
      for (int w = 0; w < 4; ++w) {
        out[start + 8 * i + 2 * w] = static_cast<uint16_t>(words[w][i]);
        out[start + 8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w][i] >> 16);
      }
    }
  }
}

#endif

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

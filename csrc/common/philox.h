// Philox-4x32-10 (Salmon et al., SC 2011), for per-instruction-set files: internal linkage. The same bits as Triton's tl.philox.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace clk {
namespace {

constexpr int kPhiloxCounters = 16;                  // worked on together, so that their chains of products overlap
constexpr int kPhiloxWords = 4 * kPhiloxCounters;

constexpr uint32_t kPhiloxMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u}, kPhiloxKeys[2] = {0x9E3779B9u, 0xBB67AE85u};

#if defined(__AVX2__)

// Four counters, each word in the lower half of a 64-bit lane; what the upper halves hold never matters, because products ignore it.
struct PhiloxLanes {
  __m256i c0, c1, c2, c3;

  void start(uint64_t counter) {
    c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), _mm256_setr_epi64x(0, 1, 2, 3));
    c1 = _mm256_srli_epi64(c0, 32);
    c2 = c3 = _mm256_setzero_si256();
  }

  void round(__m256i k0, __m256i k1) {
    const __m256i first = _mm256_mul_epu32(c0, _mm256_set1_epi64x(kPhiloxMultipliers[0]));
    const __m256i second = _mm256_mul_epu32(c2, _mm256_set1_epi64x(kPhiloxMultipliers[1]));
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), c1), k0);
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), c3), k1);
    c1 = second;
    c3 = first;
  }

  void store(uint32_t* out) const {
    const __m256i front = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i back = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(front, back), odd = _mm256_unpackhi_epi64(front, back);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

// Counter after counter, (counter, 0, 0), (counter + 1, 0, 0), …, under key `seed`: the four words of each, in order.
inline void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[kPhiloxWords]) {
  PhiloxLanes lanes[kPhiloxCounters / 4];
  for (int i = 0; i < kPhiloxCounters / 4; ++i) lanes[i].start(counter + static_cast<uint64_t>(4 * i));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxKeys[0], k1 += kPhiloxKeys[1]) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (PhiloxLanes& four : lanes) four.round(key0, key1);
  }
  for (int i = 0; i < kPhiloxCounters / 4; ++i) lanes[i].store(words + 16 * i);
}

#else

inline void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[kPhiloxWords]) {
  for (int i = 0; i < kPhiloxCounters; ++i, ++counter) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxKeys[0], k1 += kPhiloxKeys[1]) {
      const uint64_t first = static_cast<uint64_t>(c0) * kPhiloxMultipliers[0];
      const uint64_t second = static_cast<uint64_t>(c2) * kPhiloxMultipliers[1];
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
    }
    words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
  }
}

#endif

// Uniform in [0, 1), from the word read as a signed integer folded onto its non-negative half: x where x >= 0, else -x - 1.
inline float uniform(uint32_t word) {
  const int32_t number = static_cast<int32_t>(word);
  return static_cast<float>(number < 0 ? ~number : number) * 4.6566127342e-10f;
}

// line[i] *= grown where element i survives dropout with probability p, else 0: word i % 4 of counter offset + i / 4 decides.
template <typename C>
void apply_dropout(uint64_t seed, uint64_t offset, float p, C grown, int64_t n, C* line) {
  uint32_t words[kPhiloxWords];
  for (int64_t start = 0; start < n; start += kPhiloxWords, offset += kPhiloxCounters) {
    philox(seed, offset, words);
    const int64_t count = n - start < kPhiloxWords ? n - start : kPhiloxWords;
    for (int64_t i = 0; i < count; ++i) line[start + i] *= uniform(words[i]) >= p ? grown : C(0);
  }
}

}  // namespace
}  // namespace clk

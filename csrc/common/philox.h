// Philox-4x32-10 (Salmon et al., SC 2011), for per-instruction-set files: internal linkage. The same bits as Triton's tl.philox.
#pragma once

#include <cstdint>

namespace clk {
namespace {

constexpr int kPhiloxLanes = 16;  // counters worked on together, in loops that compilers turn into vectors

// words[w][i] = word w of counter (offset + i, 0, 0) under key `seed`.
inline void philox(uint64_t seed, uint64_t offset, uint32_t (&words)[4][kPhiloxLanes]) {
  auto& [c0, c1, c2, c3] = words;
  for (int i = 0; i < kPhiloxLanes; ++i) {
    c0[i] = static_cast<uint32_t>(offset + static_cast<uint64_t>(i));
    c1[i] = static_cast<uint32_t>((offset + static_cast<uint64_t>(i)) >> 32);
    c2[i] = c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t first = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(second >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(second);
      c2[i] = static_cast<uint32_t>(first >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(first);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Uniform in [0, 1), from the word read as a signed integer folded onto its non-negative half.
inline float uniform(uint32_t word) {
  const int32_t number = static_cast<int32_t>(word);
  return static_cast<float>(number < 0 ? -number - 1 : number) * 4.6566127342e-10f;
}

// factors[i] = grown where element i survives dropout with probability p, else 0: word i % 4 of counter offset + i / 4 decides.
template <typename C>
void dropout_factors(uint64_t seed, uint64_t offset, float p, C grown, int64_t n, C* factors) {
  uint32_t words[4][kPhiloxLanes];
  for (int64_t start = 0; start < n; start += 4 * kPhiloxLanes, offset += kPhiloxLanes) {
    philox(seed, offset, words);
    C block[4 * kPhiloxLanes];
    for (int i = 0; i < kPhiloxLanes; ++i) {
      for (int w = 0; w < 4; ++w) block[4 * i + w] = uniform(words[w][i]) >= p ? grown : C(0);
    }
    const int64_t count = n - start < 4 * kPhiloxLanes ? n - start : 4 * kPhiloxLanes;
    for (int64_t i = 0; i < count; ++i) factors[start + i] = block[i];
  }
}

}  // namespace
}  // namespace clk

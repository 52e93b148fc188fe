// Philox-4x32-10 (Salmon et al., SC 2011), for per-instruction-set files: internal linkage. The same bits as Triton's tl.rand.
#pragma once

#include <cstdint>

namespace clk {
namespace {

// First word of counter (offset, 0, 0) under key `seed`.
inline uint32_t philox(uint64_t seed, uint64_t offset) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Uniform in [0, 1), from the word read as a signed integer folded onto its non-negative half.
inline float uniform(uint64_t seed, uint64_t offset) {
  const int32_t word = static_cast<int32_t>(philox(seed, offset));
  return static_cast<float>(word < 0 ? -word - 1 : word) * 4.6566127342e-10f;
}

}  // namespace
}  // namespace clk

// Pieces of scratch memory for the adapters' per-instruction-set kernels, and how rows lie in them: internal linkage.
#pragma once

#include <cstdint>

namespace clk {
namespace {

// Hands out aligned pieces of the caller's scratch memory; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t n) {
    char* piece = base + used;
    used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

// Whether rows so many elements apart crowd into one or two of the sets of a first-level cache, which hold what is 4 KiB apart. Then a
// dozen of them push each other out, however small they are. (L, B, D) in memory, CLIP's order, does that to the tokens of a sample.
template <typename T>
constexpr bool crowds(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(T)) % 2048 == 0;
}

// At least n elements, an odd number of cache lines: rows so far apart spread over all sets.
template <typename C>
constexpr int64_t spread(int64_t n) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(C));
  return ((n + line - 1) / line | 1) * line;
}

template <typename C>
struct Matrix {
  const C* data;
  int64_t ld;
};

}  // namespace
}  // namespace clk

// Pieces of scratch memory for the adapters' per-instruction-set kernels: internal linkage.
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

template <typename C>
struct Matrix {
  const C* data;
  int64_t ld;
};

}  // namespace
}  // namespace clk

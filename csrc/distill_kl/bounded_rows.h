// Rows of features for the bounded kernels: read in place where that is possible, converted or packed where not.
#pragma once

#include <type_traits>

#include "common/convert.h"
#include "common/gemm.h"

namespace clk {
namespace {

template <typename C>
constexpr int64_t whole(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Width of the panel that starts at `at` of `n` columns, n a multiple of the vector width.
template <typename C>
inline int64_t width_at(int64_t at, int64_t n) {
  return n - at < 2 * kLanes<C> ? kLanes<C> : 2 * kLanes<C>;
}

// f(first, rows) for tiles of at most kTileRows rows, all of nearly the same size.
template <typename F>
inline void for_tiles(int64_t n, const F& f) {
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) f(n * t / tiles, static_cast<int>(n * (t + 1) / tiles - n * t / tiles));
}

// A matrix by rows.
template <typename C>
struct Rows {
  const C* data;
  int64_t stride;
};

// C (I x J) = A B or += A B, with B by rows and J a multiple of the vector width; A is (I, K) or, transposed, (K, I).
template <typename C, bool TRANSPOSED>
inline void multiply_rows(const C* a, int64_t lda, int64_t I, Rows<C> b, int64_t K, int64_t J, C* c, int64_t ldc, bool accumulate) {
  for_tiles(I, [&](int64_t i, int rows) {
    for (int64_t j = 0; j < J; j += 2 * kLanes<C>) {
      multiply_panel<C, TRANSPOSED>(rows, TRANSPOSED ? a + i : a + i * lda, lda, b.data + j, b.stride, K, width_at<C>(j, J),
                                    c + i * ldc + j, ldc, accumulate);
    }
  });
}

// Row-major features as C, in place where they already are: rows [first, first + n) of `from`, else converted into `to`.
template <typename C, typename T>
inline Rows<C> rows_of(const void* from, int64_t first, int64_t n, int64_t d, bool whole_vectors, C* to) {
  const T* source = static_cast<const T*>(from) + first * d;
  if constexpr (std::is_same_v<C, T>) {
    if (!whole_vectors || d % kLanes<C> == 0) return {source, d};
  }
  const int64_t line = whole<C>(d), stride = line + kLanes<C>;  // off the powers of two, whose rows would share cache sets
  for (int64_t i = 0; i < n; ++i, source += d) {
    C* row = to + i * stride;
    convert(source, d, row);
    for (int64_t j = d; j < line; ++j) row[j] = 0;
  }
  return {to, stride};
}

// Rows [n0, n0 + n) of `from` times `factor` as panels: [panel][d][width], zeros beyond n.
template <typename C, typename T>
inline void pack_rows(const void* from, int64_t n0, int64_t n, int64_t d, C factor, C* to) {
  constexpr int64_t W = kLanes<C>;
  const T* source = static_cast<const T*>(from) + n0 * d;
  const int64_t lanes = whole<C>(n);
  for (int64_t j = 0; j < lanes; j += W) {
    const int64_t panel = j / (2 * W) * 2 * W, width = width_at<C>(panel, lanes), rows = n - j < W ? n - j : W;
    C* out = to + panel * d + j - panel;
    for (int64_t k = 0; k < d; k += W) {
      const int64_t steps = d - k < W ? d - k : W;
      Vec<C> v[W] = {};
      if (rows == W && steps == W) {
        for (int64_t i = 0; i < W; ++i) v[i] = load_vector(source + (j + i) * d + k);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t s = 0; s < steps; ++s) v[i][s] = load(source + (j + i) * d + k + s);
        }
      }
      transpose_square<C>(v);
      for (int64_t s = 0; s < steps; ++s) store_vector(out + (k + s) * width, v[s] * factor);
    }
  }
}

}  // namespace
}  // namespace clk

// Small matrix products in registers, for per-instruction-set files: everything here has internal linkage.
//
// C (rows, n) = A (rows, K) · B (K, n), with B packed into panels of `panel_width` columns so that one step of K reads
// consecutive vectors. Rows go in tiles of at most kTileRows, whose accumulators stay in registers over all of K. The order of
// every sum is fixed by the shapes alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/convert.h"
#include "common/scalar.h"
#include "common/vector.h"

namespace clk {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

template <typename C>
constexpr int64_t panel_width(int64_t n) {
  return n <= Vector<C>::width ? Vector<C>::width : 2 * Vector<C>::width;
}

// Columns of B after padding to whole panels.
template <typename C>
constexpr int64_t padded(int64_t n) {
  return (n + panel_width<C>(n) - 1) / panel_width<C>(n) * panel_width<C>(n);
}

// One tile. A is (rows, K) with leading dimension lda, or, transposed, (K, rows). C is overwritten or added to.
template <typename C, int ROWS, int VECTORS, bool TRANSPOSED>
void tile(const C* a, int64_t lda, const C* b, int64_t ldb, int64_t K, C* c, int64_t ldc, bool accumulate) {
  using V = typename Vector<C>::type;
  constexpr int W = Vector<C>::width;
  V sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = V{};
  }
  for (int64_t k = 0; k < K; ++k) {
    V row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) std::memcpy(&row[v], b + k * ldb + v * W, sizeof(V));
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const C value = TRANSPOSED ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += value * row[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      C* out = c + i * ldc + v * W;
      V total = sum[i][v];
      if (accumulate) {
        V before;
        std::memcpy(&before, out, sizeof(V));
        total += before;
      }
      std::memcpy(out, &total, sizeof(V));
    }
  }
}

template <typename C, int VECTORS, bool TRANSPOSED>
void tile_of(int rows, const C* a, int64_t lda, const C* b, int64_t ldb, int64_t K, C* c, int64_t ldc, bool accumulate) {
#define CLK_ROWS(N) case N: return tile<C, (N <= kTileRows ? N : 1), VECTORS, TRANSPOSED>(a, lda, b, ldb, K, c, ldc, accumulate)
  switch (rows) {
    CLK_ROWS(1); CLK_ROWS(2); CLK_ROWS(3); CLK_ROWS(4); CLK_ROWS(5); CLK_ROWS(6);
    CLK_ROWS(7); CLK_ROWS(8); CLK_ROWS(9); CLK_ROWS(10); CLK_ROWS(11); CLK_ROWS(12);
  }
#undef CLK_ROWS
}

// C (rows, width) = A · one panel of B.
template <typename C, bool TRANSPOSED = false>
void multiply_panel(int rows, const C* a, int64_t lda, const C* b, int64_t ldb, int64_t K, int64_t width, C* c, int64_t ldc,
                    bool accumulate) {
  if (width == Vector<C>::width) {
    tile_of<C, 1, TRANSPOSED>(rows, a, lda, b, ldb, K, c, ldc, accumulate);
  } else {
    tile_of<C, 2, TRANSPOSED>(rows, a, lda, b, ldb, K, c, ldc, accumulate);
  }
}

// Packs B (K, n) into panels (n / width, K, width), zeros beyond n. Element (k, j) is source[k * row + j * column]; `last` (n), unless it
// is null, becomes one row more.
template <typename C, typename T>
void pack(const T* source, int64_t K, int64_t n, int64_t row, int64_t column, C* packed, const T* last = nullptr) {
  const int64_t width = panel_width<C>(n), rows = K + (last ? 1 : 0);
  for (int64_t start = 0; start < n; start += width, packed += rows * width) {
    const int64_t columns = n - start < width ? n - start : width;
    const T* from = source + start * column;
    if (column == 1) {
      for (int64_t k = 0; k < K; ++k) convert(from + k * row, columns, packed + k * width);
    } else if (row == 1) {
      transposed_copy(from, column, columns, K, packed, width);
    } else {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t j = 0; j < columns; ++j) packed[k * width + j] = static_cast<C>(load(from + k * row + j * column));
      }
    }
    if (last) convert(last + start, columns, packed + K * width);
    for (int64_t k = 0; k < rows && columns < width; ++k) {
      for (int64_t j = columns; j < width; ++j) packed[k * width + j] = C(0);
    }
  }
}

}  // namespace
}  // namespace clk

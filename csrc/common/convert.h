// Vectors from and to storage types, and transposed copies, for per-instruction-set files: internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/scalar.h"
#include "common/vector.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace clk {
namespace {

// The vector of compute type behind kLanes<float> stored 16-bit numbers.
inline Vec<float> load_vector(const BFloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow stored;
  std::memcpy(&stored, p, sizeof(stored));
  const Vec<uint32_t> bits = __builtin_convertvector(stored, Vec<uint32_t>) << 16;
  Vec<float> value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest even; NaN stays NaN.
inline void store_vector(BFloat16* p, Vec<float> value) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Vec<uint32_t> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> chosen = (bits & 0x7fffffffu) > 0x7f800000u ? splat<uint32_t>(0x7fc0u) : rounded;
  const Narrow stored = __builtin_convertvector(chosen, Narrow);
  std::memcpy(p, &stored, sizeof(stored));
}

inline Vec<float> load_vector(const Half* p) {
#if defined(__AVX512F__)
  __m256i stored;
  std::memcpy(&stored, p, sizeof(stored));
  return Vec<float>(_mm512_cvtph_ps(stored));
#elif defined(__F16C__)
  __m128i stored;
  std::memcpy(&stored, p, sizeof(stored));
  return Vec<float>(_mm256_cvtph_ps(stored));
#else
  float lanes[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = load(p + i);
  return load_vector(lanes);
#endif
}

inline void store_vector(Half* p, Vec<float> value) {
#if defined(__AVX512F__)
  const __m256i stored = _mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &stored, sizeof(stored));
#elif defined(__F16C__)
  const __m128i stored = _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &stored, sizeof(stored));
#else
  float lanes[kLanes<float>];
  std::memcpy(lanes, &value, sizeof(lanes));
  for (int i = 0; i < kLanes<float>; ++i) store(p + i, lanes[i]);
#endif
}

// to[i] = from[i], between a storage type and its compute type, or of one type.
template <typename From, typename To>
void convert(const From* from, int64_t n, To* to) {
  if constexpr (sizeof(From) == sizeof(To)) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(To));
  } else {
    constexpr int64_t W = kLanes<float>;
    int64_t i = 0;
    for (; i + W <= n; i += W) store_vector(to + i, load_vector(from + i));
    for (; i < n; ++i) store(to + i, load(from + i));
  }
}

// Transposes a square of vectors: halves of the square change places, then halves of the halves.
template <typename C, int HALF = kLanes<C> / 2>
inline void transpose_square(Vec<C> (&v)[kLanes<C>]) {
  typedef typename std::conditional<sizeof(C) == 4, int32_t, int64_t>::type Index;
  constexpr int W = kLanes<C>;
  Vec<Index> first, second;
  for (int l = 0; l < W; ++l) {
    first[l] = (l & HALF) ? W + l - HALF : l;
    second[l] = (l & HALF) ? W + l : l + HALF;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & HALF) continue;
    const Vec<C> a = v[i], b = v[i + HALF];
    v[i] = __builtin_shuffle(a, b, first);
    v[i + HALF] = __builtin_shuffle(a, b, second);
  }
  if constexpr (HALF > 1) transpose_square<C, HALF / 2>(v);
}

// to[j * ldt + i] = from[i * ldf + j] for i < m, j < n; with ADD, += instead.
template <bool ADD = false, typename From, typename To>
void transposed_copy(const From* from, int64_t ldf, int64_t m, int64_t n, To* to, int64_t ldt) {
  using C = compute_t<From>;
  constexpr int64_t W = kLanes<C>;
  const auto one = [](const From* source, To* target) { store(target, ADD ? load(target) + load(source) : load(source)); };
  int64_t i = 0;
  for (; i + W <= m; i += W) {
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      Vec<C> v[W];
      for (int64_t u = 0; u < W; ++u) v[u] = load_vector(from + (i + u) * ldf + j);
      transpose_square<C>(v);
      for (int64_t u = 0; u < W; ++u) {
        To* target = to + (j + u) * ldt + i;
        store_vector(target, ADD ? load_vector(target) + v[u] : v[u]);
      }
    }
    for (; j < n; ++j) {
      for (int64_t u = i; u < i + W; ++u) one(from + u * ldf + j, to + j * ldt + u);
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t u = i; u < m; ++u) one(from + u * ldf + j, to + j * ldt + u);
  }
}

}  // namespace
}  // namespace clk

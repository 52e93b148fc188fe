// Conversions of blocks between storage and arithmetic, for per-instruction-set files: internal linkage.
//
// Compilers turn loops over float, double and BFloat16 into vectors; Half needs its instructions named.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/scalar.h"

namespace clk {
namespace {

template <typename C, typename T>
inline void widen(C* __restrict out, const T* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(load(in + i));
}

inline void widen(float* __restrict out, const Half* __restrict in, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = load(in + i);
}

inline void narrow(Half* __restrict out, const float* __restrict in, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
#endif
  for (; i < n; ++i) store(out + i, in[i]);
}

}  // namespace
}  // namespace clk

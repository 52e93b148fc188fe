// Compiled once per instruction set, see common/isa.h.
//
// Memory is the limit, so what counts is that reads are under way early enough. Vectors are 32 bytes also where the machine has 64: with
// those, two streams of 4-KiB pages ran 20 % slower (Zen 4). Before the first include, because inlining wants equal options.
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=256")
#endif

#include "weight_average/cpu_kernels.h"

#include "weight_average/stochastic.h"

namespace clk {
namespace CLK_ISA {
namespace {

// Elements between two looks at how far the next page is, and of the buffers, which stay in the first-level cache.
constexpr int64_t kBlock = 256;

// Hardware prefetchers stop at the end of a page: without help every 4 KiB of a stream start with misses, and a table walk. The first
// lines of the page that begins 2 to 3 KiB ahead are asked for here; by the time they are used, the hardware has found the stream.
inline void prefetch_next_page(const void* position, int64_t bytes) {
#if defined(__GNUC__)
  constexpr uintptr_t page = 4096, line = 64, lines = 8, ahead = 2048;
  const uintptr_t from = reinterpret_cast<uintptr_t>(position) + ahead;
  const uintptr_t start = (from + page - 1) / page * page;
  if (start - from >= static_cast<uintptr_t>(bytes)) return;
  for (uintptr_t i = 0; i < lines; ++i) __builtin_prefetch(reinterpret_cast<const char*>(start + i * line));
#endif
}

template <typename Dst, typename Src, bool THREE>
inline compute_t<Dst> averaged(const Dst* dst, const Src* src, const compute_t<Dst>* other, int64_t i, compute_t<Dst> w, compute_t<Dst> u) {
  using C = compute_t<Dst>;
  const C a = load(dst + i);
  const C result = a + w * (static_cast<C>(load(src + i)) - a);
  return THREE ? result + u * (other[i] - a) : result;
}

template <typename C, typename T>
void widen(C* __restrict out, const T* __restrict in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(load(in + i));
}

template <typename C>
void widen_any(C* out, Storage type, const void* in, int64_t start, int64_t n) {
  switch (type) {
    case Storage::f32: return widen(out, static_cast<const float*>(in) + start, n);
    case Storage::f64: return widen(out, static_cast<const double*>(in) + start, n);
    case Storage::bf16: return widen(out, static_cast<const BFloat16*>(in) + start, n);
    case Storage::f16: return widen(out, static_cast<const Half*>(in) + start, n);
  }
}

template <typename Dst, typename Src, bool THREE>
void block_nearest(Dst* __restrict dst, const Src* __restrict src, const compute_t<Dst>* __restrict other, int64_t n, compute_t<Dst> w,
                   compute_t<Dst> u) {
  for (int64_t i = 0; i < n; ++i) store(dst + i, averaged<Dst, Src, THREE>(dst, src, other, i, w, u));
}

template <typename Dst, typename Src, bool THREE>
void block_stochastic(Dst* __restrict dst, const Src* __restrict src, const float* __restrict other, int64_t n, float w, float u,
                      uint64_t seed, uint64_t counter) {
  float exact[kBlock];
  uint16_t bits[kBlock];
  for (int64_t i = 0; i < n; ++i) exact[i] = averaged<Dst, Src, THREE>(dst, src, other, i, w, u);
  random_bits<kBlock>(seed, counter, bits);
  for (int64_t i = 0; i < n; ++i) store_stochastic(dst + i, exact[i], bits[i]);
}

template <typename Dst, typename Src, bool THREE>
void average(const AveragePiece& piece, const AverageRule& rule) {
  using C = compute_t<Dst>;
  Dst* dst = static_cast<Dst*>(piece.dst);
  const Src* src = static_cast<const Src*>(piece.src);
  const C w = static_cast<C>(rule.weight), u = static_cast<C>(rule.other_weight);
  C other[THREE ? kBlock : 1];
  const auto block = [&](int64_t start, int64_t n) __attribute__((always_inline)) {
    prefetch_next_page(src + start, kBlock * sizeof(Src));
    prefetch_next_page(dst + start, kBlock * sizeof(Dst));
    if constexpr (THREE) widen_any(other, piece.other_type, piece.other, start, n);
    if constexpr (sizeof(Dst) == 2) {
      if (rule.stochastic) {
        block_stochastic<Dst, Src, THREE>(dst + start, src + start, other, n, w, u, rule.seed,
                                          piece.counter + static_cast<uint64_t>(start / kElementsPerCounter));
        return;
      }
    }
    block_nearest<Dst, Src, THREE>(dst + start, src + start, other, n, w, u);
  };
  int64_t start = 0;
  for (; start + kBlock <= piece.n; start += kBlock) block(start, kBlock);  // a constant length leaves no remainder to test for
  if (start < piece.n) block(start, piece.n - start);
}

template <typename Dst, typename Src>
void average_from(const AveragePiece& piece, const AverageRule& rule) {
  return piece.other != nullptr ? average<Dst, Src, true>(piece, rule) : average<Dst, Src, false>(piece, rule);
}

template <typename Dst>
void average_into(const AveragePiece& piece, const AverageRule& rule) {
  switch (piece.src_type) {
    case Storage::f32: return average_from<Dst, float>(piece, rule);
    case Storage::f64: return average_from<Dst, double>(piece, rule);
    case Storage::bf16: return average_from<Dst, BFloat16>(piece, rule);
    case Storage::f16: return average_from<Dst, Half>(piece, rule);
  }
}

}  // namespace

void average_piece(const AveragePiece& piece, const AverageRule& rule) {
  switch (piece.dst_type) {
    case Storage::f32: return average_into<float>(piece, rule);
    case Storage::f64: return average_into<double>(piece, rule);
    case Storage::bf16: return average_into<BFloat16>(piece, rule);
    case Storage::f16: return average_into<Half>(piece, rule);
  }
}

}  // namespace CLK_ISA
}  // namespace clk

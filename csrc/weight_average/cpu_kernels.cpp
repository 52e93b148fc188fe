// Compiled once per instruction set, see common/isa.h.
//
// Memory is the limit, so what counts is that reads are under way early enough. Vectors are 32 bytes also where the machine has 64: with
// those, two streams of 4-KiB pages ran 20 % slower (Zen 4). Before the first include, because inlining wants equal options.
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
#pragma GCC target("prefer-vector-width=256")
#endif

#include "weight_average/cpu_kernels.h"

#include <type_traits>

#include "weight_average/blocks.h"
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

template <typename C>
void widen_any(C* out, Storage type, const void* in, int64_t start, int64_t n) {
  switch (type) {
    case Storage::f32: return widen(out, static_cast<const float*>(in) + start, n);
    case Storage::f64: return widen(out, static_cast<const double*>(in) + start, n);
    case Storage::bf16: return widen(out, static_cast<const BFloat16*>(in) + start, n);
    case Storage::f16: return widen(out, static_cast<const Half*>(in) + start, n);
  }
}

// out may be dst, which is read and written at the same place.
template <typename Out, typename Dst, typename Src, bool THREE>
inline void block(Out* out, const Dst* dst, const Src* src, const compute_t<Dst>* other, int64_t n, compute_t<Dst> w, compute_t<Dst> u) {
  using C = compute_t<Dst>;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const C a = load(dst + i);
    C result = a + w * (static_cast<C>(load(src + i)) - a);
    if (THREE) result += u * (other[i] - a);
    store(out + i, result);
  }
}

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

template <typename C>
constexpr Storage kStorageOf = sizeof(C) == 8 ? Storage::f64 : Storage::f32;  // of what is computed in

template <typename Dst, typename Src, bool THREE>
class Average {
  using C = compute_t<Dst>;
  using Readable = std::conditional_t<kIsHalf<Src>, C, Src>;  // what blocks of Src are read as

 public:
  Average(const AveragePiece& piece, const AverageRule& rule)
      : piece_(piece), rule_(rule), w_(static_cast<C>(rule.weight)), u_(static_cast<C>(rule.other_weight)) {}

  void run() {
    int64_t start = 0;
    for (; start + kBlock <= piece_.n; start += kBlock) step(start, kBlock);  // a constant length leaves no remainder to test for
    if (start < piece_.n) step(start, piece_.n - start);
  }

 private:
  inline __attribute__((always_inline)) void step(int64_t start, int64_t n) {
    Dst* dst = static_cast<Dst*>(piece_.dst) + start;
    const Src* src = static_cast<const Src*>(piece_.src) + start;
    prefetch_next_page(src, kBlock * sizeof(Src));
    prefetch_next_page(dst, kBlock * sizeof(Dst));
    const Readable* value;
    if constexpr (kIsHalf<Src>) {
      widen(value_, src, n);
      value = value_;
    } else {
      value = src;
    }
    const C* other = other_;
    if constexpr (THREE) {
      const int64_t size = bytes_of(piece_.other_type);
      prefetch_next_page(static_cast<const char*>(piece_.other) + start * size, kBlock * size);
      if (piece_.other_type == kStorageOf<C>) {
        other = static_cast<const C*>(piece_.other) + start;
      } else {
        widen_any(other_, piece_.other_type, piece_.other, start, n);
      }
    }
    if constexpr (sizeof(Dst) == 2) {
      if (kIsHalf<Dst> || rule_.stochastic) return step_in_buffer(dst, value, other, start, n);
    }
    block<Dst, Dst, Readable, THREE>(dst, dst, value, other, n, w_, u_);
  }

  // By way of the exact result in the first-level cache.
  void step_in_buffer(Dst* dst, const Readable* value, const C* other, int64_t start, int64_t n) {
    widen(exact_, dst, n);
    block<float, float, Readable, THREE>(exact_, exact_, value, other, n, w_, u_);
    if (rule_.stochastic) {
      random_bits<kBlock>(rule_.seed, piece_.counter + static_cast<uint64_t>(start / kElementsPerCounter), random_);
      if constexpr (kIsHalf<Dst>) {
        for (int64_t i = 0; i < n; ++i) exact_[i] = round_to_half(exact_[i], random_[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) dst[i].bits = round_to_bfloat16(exact_[i], random_[i]);
      }
    }
    if constexpr (kIsHalf<Dst>) narrow(dst, exact_, n);
  }

  const AveragePiece& piece_;
  const AverageRule& rule_;
  const C w_, u_;
  C value_[kIsHalf<Src> ? kBlock : 1];
  C other_[THREE ? kBlock : 1];  // unless it is stored as what is computed in
  float exact_[sizeof(Dst) == 2 ? kBlock : 1];
  uint16_t random_[sizeof(Dst) == 2 ? kBlock : 1];
};

template <typename Dst, typename Src>
void average_from(const AveragePiece& piece, const AverageRule& rule) {
  if (piece.other != nullptr) return Average<Dst, Src, true>(piece, rule).run();
  Average<Dst, Src, false>(piece, rule).run();
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

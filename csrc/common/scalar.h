// Storage types of the CPU kernels and the type that arithmetic on them is done in.
//
// float and double compute as themselves; Half and BFloat16 are stored in 16 bits and computed in float. This header may be
// included from per-instruction-set files: everything in it has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

namespace clk {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <typename T>
using compute_t = typename Compute<T>::type;

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }

inline float load(const BFloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Round to nearest even; NaN stays NaN. Written without branches so that loops over it vectorise.
inline void store(BFloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

#if defined(__F16C__) || defined(__aarch64__)
inline float load(const Half* p) {
  _Float16 value;
  std::memcpy(&value, p, sizeof(value));
  return static_cast<float>(value);
}
inline void store(Half* p, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(p, &half, sizeof(half));
}
#else
inline float load(const Half* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(p->bits & 0x7fffu) << 13;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals; infinities and NaNs need their exponent restored.
  float value;
  std::memcpy(&value, &magnitude, sizeof(value));
  value *= 5.192296858534828e33f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((p->bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void store(Half* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (bits >= 0x477ff000u) {  // rounds to 65520 or more: infinity
    p->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (bits < 0x38800000u) {  // subnormal half: adding 0.5 lets the hardware round at the right bit
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &magnitude, sizeof(shifted));
    p->bits = static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  } else {
    const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
    p->bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}
#endif

}  // namespace
}  // namespace clk

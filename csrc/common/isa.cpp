#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace clk {
namespace {

bool supported(Isa isa) {
#if defined(CLK_MULTIVERSION)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  constexpr Isa best_first[] = {Isa::avx512, Isa::avx2, Isa::baseline};
  if (const char* wanted = std::getenv("CL_KERNELS_ISA")) {
    for (Isa isa : best_first) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && supported(isa)) return isa;
    }
  }
  for (Isa isa : best_first) {
    if (supported(isa)) return isa;
  }
  return Isa::baseline;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace clk

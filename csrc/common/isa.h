// Which build of the CPU kernels runs on this machine.
//
// Every <operation>/cpu_kernels.cpp is compiled once per instruction set, each time with CLK_ISA naming the namespace that
// its functions live in. Such a file must define everything it uses inside that namespace or an anonymous one: an inline
// function with external linkage would be merged by the linker across instruction sets, and the survivor could be one that
// this machine cannot execute.
#pragma once

#include <string>

namespace clk {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set of this machine that was compiled, or the one CL_KERNELS_ISA asks for if it can run.
Isa active_isa();

const char* isa_name(Isa isa);

// Calls FUNCTION of the namespace that fits this machine: CLK_CALL(average_chunk, dst, src, n, weight).
#if defined(CLK_MULTIVERSION)
#define CLK_CALL(FUNCTION, ...)                                 \
  [&] {                                                         \
    switch (::clk::active_isa()) {                              \
      case ::clk::Isa::avx512: return avx512::FUNCTION(__VA_ARGS__); \
      case ::clk::Isa::avx2: return avx2::FUNCTION(__VA_ARGS__);     \
      default: return baseline::FUNCTION(__VA_ARGS__);          \
    }                                                           \
  }()
#else
#define CLK_CALL(FUNCTION, ...) baseline::FUNCTION(__VA_ARGS__)
#endif

}  // namespace clk

// Host-only module: what was built and what this machine can run. No torch, no CUDA.
#include <pybind11/pybind11.h>

#include "common/isa.h"

#ifndef CLK_CUDA_ARCHITECTURES
#define CLK_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_host, module) {
  module.doc() = "What the compiled kernels were built for and which of it runs here.";
  module.attr("cuda_architectures") = CLK_CUDA_ARCHITECTURES;
  module.attr("compiler") = __VERSION__;
#if defined(CLK_MULTIVERSION)
  module.attr("instruction_sets") = "baseline avx2 avx512";
#else
  module.attr("instruction_sets") = "baseline";
#endif
  module.def("active_instruction_set", [] { return clk::isa_name(clk::active_isa()); },
             "Name of the instruction set whose kernels run on this machine.");
}

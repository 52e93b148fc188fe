// Compiled once per instruction set, see common/isa.h.
#include "distill_kl/cpu_kernels.h"

#include "distill_kl/features.h"
#include "distill_kl/logits.h"

namespace clk {
namespace CLK_ISA {

void distill_forward(const LogitsProblem& problem, int64_t begin, int64_t end) {
  problem.f64 ? run_logits<double>(problem, begin, end, false) : run_logits<float>(problem, begin, end, false);
}

void distill_backward(const LogitsProblem& problem, int64_t begin, int64_t end) {
  problem.f64 ? run_logits<double>(problem, begin, end, true) : run_logits<float>(problem, begin, end, true);
}

int64_t feature_padded(const FeatureProblem& problem, int64_t columns) {
  return problem.dtype == Dtype::f64 ? padded<double>(columns) : padded<float>(columns);
}

int64_t feature_scratch(const FeatureProblem& problem, int64_t rows, bool backward) {
  return scratch_bytes(problem, rows, backward);
}

void feature_forward(const FeatureProblem& problem, const FeatureTask& task) {
  switch (problem.dtype) {
    case Dtype::f32: return forward_task<float, float>(problem, task);
    case Dtype::f64: return forward_task<double, double>(problem, task);
    case Dtype::bf16: return forward_task<float, BFloat16>(problem, task);
    case Dtype::f16: return forward_task<float, Half>(problem, task);
  }
}

void feature_backward(const FeatureProblem& problem, const FeatureTask& task, const FeatureBackward& backward) {
  switch (problem.dtype) {
    case Dtype::f32: return backward_task<float, float>(problem, task, backward);
    case Dtype::f64: return backward_task<double, double>(problem, task, backward);
    case Dtype::bf16: return backward_task<float, BFloat16>(problem, task, backward);
    case Dtype::f16: return backward_task<float, Half>(problem, task, backward);
  }
}

}  // namespace CLK_ISA
}  // namespace clk

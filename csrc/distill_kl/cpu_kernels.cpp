// Compiled once per instruction set, see common/isa.h.
#include "distill_kl/cpu_kernels.h"

#include "distill_kl/bounded_gradient.h"
#include "distill_kl/bounded_sums.h"
#include "distill_kl/feature_backward.h"
#include "distill_kl/feature_forward.h"
#include "distill_kl/logits.h"

namespace clk {
namespace {

// Calls f with values of the compute type and of the storage type.
template <typename F>
inline auto with_types(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f64: return f(double(), double());
    case Dtype::bf16: return f(float(), BFloat16());
    case Dtype::f16: return f(float(), Half());
    default: return f(float(), float());
  }
}

}  // namespace

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
  with_types(problem.dtype, [&](auto c, auto t) { forward_task<decltype(c), decltype(t)>(problem, task); });
}

void feature_backward(const FeatureProblem& problem, const FeatureTask& task, const FeatureBackward& backward) {
  with_types(problem.dtype, [&](auto c, auto t) { backward_task<decltype(c), decltype(t)>(problem, task, backward); });
}

int64_t bounded_line(const FeatureProblem& problem) {
  return with_types(problem.dtype, [&](auto c, auto) { return whole<decltype(c)>(problem.d); });
}

int64_t bounded_scratch(const FeatureProblem& problem) {
  return with_types(problem.dtype, [&](auto c, auto t) { return BoundedTiles<decltype(c), decltype(t)>::bytes(problem); });
}

void bounded_pack(const FeatureProblem& problem, int64_t block, void* packed) {
  with_types(problem.dtype, [&](auto c, auto t) { pack_block<decltype(c), decltype(t)>(problem, block, packed); });
}

bool bounded_sums(const BoundedProblem& problem, const BoundedTask& task, const BoundedSums& sums) {
  return with_types(problem.features->dtype,
                    [&](auto c, auto t) { return sums_task<decltype(c), decltype(t)>(problem, task, sums); });
}

bool bounded_gradient(const BoundedProblem& problem, const BoundedTask& task, const BoundedGradient& gradient) {
  return with_types(problem.features->dtype,
                    [&](auto c, auto t) { return gradient_task<decltype(c), decltype(t)>(problem, task, gradient); });
}

}  // namespace CLK_ISA
}  // namespace clk

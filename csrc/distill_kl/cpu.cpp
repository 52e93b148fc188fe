// Distillation from logits on the CPU: layouts, allocation and the loop over threads. Every loss comes from one thread in one order.
#include <vector>

#include "common/isa.h"
#include "distill_kl/distill.h"

namespace clk {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

// The kernels need unit stride along M when there is nothing inside it, and along the inner dimension otherwise.
Tensor with_unit_stride(const Tensor& logits) {
  const int64_t inner = logits.size(2);
  const bool fits = inner == 1 ? logits.stride(1) == 1 || logits.size(1) == 1 : logits.stride(2) == 1;
  return fits ? logits : torch::stable::contiguous(logits);
}

LogitsView view_of(const Tensor& logits) {
  return {dtype_of(logits), logits.data_ptr(), logits.stride(0), logits.stride(1), logits.stride(2)};
}

LogitsProblem problem_of(const Tensor& student, const Tensor& teacher, double temperature) {
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3, "distill_kl: expected (outer, M, inner) logits");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(student.size(i) == teacher.size(i), "distill_kl: student and teacher differ in dimension ", i);
  }
  LogitsProblem p{};
  p.student = view_of(student);
  p.teacher = view_of(teacher);
  p.f64 = student.scalar_type() == ScalarType::Double;
  p.M = student.size(1);
  p.inner = student.size(2);
  p.slices = student.size(0) * p.inner;
  p.temperature = temperature;
  return p;
}

template <typename F>
void for_units(const LogitsProblem& p, const F& f) {
  if (p.slices == 0) return;
  const int64_t blocks = (p.inner + kInnerBlock - 1) / kInnerBlock;
  const int64_t units = p.slices / p.inner * blocks;
  const int64_t elements = p.M * (p.inner < kInnerBlock ? p.inner : kInnerBlock);
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)), f);
}

// Writes the gradient of `student` to `out`, (outer, M, inner) contiguous: memory of its own, or the student's.
void write_gradient(Tensor grad, const Tensor& student, const Tensor& teacher, Tensor stats, double temperature, void* out) {
  grad = torch::stable::contiguous(grad);
  stats = torch::stable::contiguous(stats);
  LogitsProblem p = problem_of(student, teacher, temperature);
  STD_TORCH_CHECK(grad.scalar_type() == compute_type(student) && stats.scalar_type() == compute_type(student) &&
                      grad.numel() == p.slices && stats.numel() == 4 * p.slices,
                  "distill_kl_backward: grad and stats do not belong to these logits");
  p.stats = stats.data_ptr();
  p.grad = grad.data_ptr();
  p.grad_student = out;
  for_units(p, [&](int64_t begin, int64_t end) { CLK_CALL(distill_backward, p, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor> distill_kl_cpu(Tensor student, Tensor teacher, double temperature, bool kl) {
  student = with_unit_stride(student);
  teacher = with_unit_stride(teacher);
  LogitsProblem p = problem_of(student, teacher, temperature);
  const int64_t outer = student.size(0);
  Tensor loss = torch::stable::new_empty(student, std::vector<int64_t>{outer, p.inner}, compute_type(student));
  Tensor stats = torch::stable::new_empty(student, std::vector<int64_t>{4, outer, p.inner}, compute_type(student));
  p.kl = kl;
  p.loss = loss.data_ptr();
  p.stats = stats.data_ptr();
  for_units(p, [&](int64_t begin, int64_t end) { CLK_CALL(distill_forward, p, begin, end); });
  return {loss, stats};
}

Tensor distill_kl_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor stats, double temperature) {
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3, "distill_kl: expected (outer, M, inner) logits");
  student = with_unit_stride(student);
  teacher = with_unit_stride(teacher);
  Tensor out = torch::stable::new_empty(student, {student.size(0), student.size(1), student.size(2)});
  write_gradient(grad, student, teacher, stats, temperature, out.data_ptr());
  return out;
}

void distill_kl_overwrite_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor stats, double temperature) {
  STD_TORCH_CHECK(student.is_contiguous(), "distill_kl_backward_: expected contiguous student logits, which are overwritten");
  write_gradient(grad, student, with_unit_stride(teacher), stats, temperature, student.data_ptr());
}

}  // namespace clk

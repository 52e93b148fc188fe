// The mean distillation of logits along dimension 1 on the CPU, with gradients in both sides, as one operation each way. Losses and
// their statistics come from the kernels of distill_kl; a matrix and its transpose are both read where they lie.
#include "distillation/distillation.h"

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/large_pages.h"
#include "distill_kl/distill.h"
#include "distillation/cpu_kernels.h"

namespace clk {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;

bool is_one(const Tensor& tensor, int64_t dim) { return tensor.stride(dim) == 1 || tensor.size(dim) == 1; }

// Both sides as (outer, M, inner), copied only where neither their rows nor their columns lie together in memory.
struct Sides {
  Tensor teacher, student;
  bool turned;  // matrices whose columns lie together: one outer index, and rows as the inner ones
  int64_t outer, M, inner;

  Sides(const Tensor& t, const Tensor& s) : teacher(t), student(s), turned(false), inner(1) {
    STD_TORCH_CHECK(t.dim() >= 2 && t.dim() == s.dim() && t.scalar_type() == s.scalar_type() && t.size(1) > 0,
                    "distillation: expected teacher and student (N, M, …) of one dtype with M > 0");
    for (int64_t i = 0; i < t.dim(); ++i) STD_TORCH_CHECK(t.size(i) == s.size(i), "distillation: teacher and student differ in dimension ", i);
    outer = t.size(0);
    M = t.size(1);
    for (int64_t i = 2; i < t.dim(); ++i) inner *= t.size(i);
    if (t.dim() == 2 && is_one(t, 1) && is_one(s, 1)) return;
    if (t.dim() == 2 && outer > 1 && t.stride(0) == 1 && s.stride(0) == 1) {
      turned = true;
      inner = outer;
      outer = 1;
      return;
    }
    teacher = torch::stable::contiguous(t);
    student = torch::stable::contiguous(s);
  }

  LogitsView view_of(const Tensor& side) const {
    const Dtype type = dtype_of(side);
    if (turned) return {type, side.data_ptr(), 0, side.stride(1), 1};
    if (side.dim() == 2) return {type, side.data_ptr(), side.stride(0), 1, 1};
    return {type, side.data_ptr(), M * inner, inner, 1};
  }

  LogitsProblem problem(double temperature) const {
    LogitsProblem p{};
    p.student = view_of(student);
    p.teacher = view_of(teacher);
    p.f64 = student.scalar_type() == ScalarType::Double;
    p.M = M;
    p.inner = inner;
    p.slices = outer * inner;
    p.temperature = temperature;
    return p;
  }

  // Uninitialised, of the sides' shape and order in memory.
  Tensor empty(bool wanted) const {
    if (!wanted) return torch::stable::new_empty(student, {0});
    if (turned) return torch::stable::transpose(on_large_pages(torch::stable::new_empty(student, {M, inner})), 0, 1);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < student.dim(); ++i) sizes.push_back(student.size(i));
    return on_large_pages(torch::stable::new_empty(student, sizes));
  }

  template <typename F>
  void for_units(const F& f) const {
    if (outer * inner == 0) return;
    const int64_t blocks = (inner + kInnerBlock - 1) / kInnerBlock, elements = M * std::min(inner, kInnerBlock);
    torch::stable::parallel_for(0, outer * blocks, std::max<int64_t>(1, kElementsPerThread / elements), f);
  }
};

template <typename C>
double mean(const void* losses, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(static_cast<const C*>(losses)[i]);
  return sum / static_cast<double>(n);  // of nothing NaN, as a mean is
}

}  // namespace

std::tuple<Tensor, Tensor> distillation_cpu(Tensor teacher, Tensor student, double temperature) {
  const Sides sides(teacher, student);
  LogitsProblem p = sides.problem(temperature);
  Tensor loss = torch::stable::new_empty(student, {});
  Tensor stats = torch::stable::new_empty(student, {4, p.slices}, compute_type(student));
  Tensor losses = torch::stable::new_empty(stats, {p.slices});
  p.stats = stats.data_ptr();
  p.loss = losses.data_ptr();
  sides.for_units([&](int64_t begin, int64_t end) { CLK_CALL(distill_forward, p, begin, end); });
  const double value = p.f64 ? mean<double>(p.loss, p.slices) : mean<float>(p.loss, p.slices);
  CLK_DISPATCH_FLOATING(student.scalar_type(), T, "distillation", [&] { store(data<T>(loss), static_cast<compute_t<T>>(value)); });
  return {loss, stats};
}

std::tuple<Tensor, Tensor> distillation_backward_cpu(Tensor grad, Tensor teacher, Tensor student, Tensor stats, double temperature,
                                                     bool need_teacher, bool need_student) {
  const Sides sides(teacher, student);
  DistillationGradients g{};
  g.logits = sides.problem(temperature);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == student.scalar_type() && stats.scalar_type() == compute_type(student) &&
                      stats.numel() == 4 * g.logits.slices && stats.is_contiguous(),
                  "distillation_backward: grad and stats do not belong to these logits");
  Tensor grad_teacher = sides.empty(need_teacher), grad_student = sides.empty(need_student);
  g.logits.stats = stats.data_ptr();
  const double upstream =
      CLK_DISPATCH_FLOATING(grad.scalar_type(), T, "distillation_backward", [&] { return static_cast<double>(load(data<T>(grad))); });
  g.factor = upstream * temperature / static_cast<double>(g.logits.slices);
  if (need_student) g.student = grad_student.data_ptr();
  if (need_teacher) g.teacher = grad_teacher.data_ptr();
  if (need_student || need_teacher) sides.for_units([&](int64_t begin, int64_t end) { CLK_CALL(distillation_gradients, g, begin, end); });
  return {grad_teacher, grad_student};
}

}  // namespace clk

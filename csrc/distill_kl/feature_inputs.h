// What both ways of distillation from features share on the host: the arguments, and memory for the tasks.
#pragma once

#include <algorithm>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "distill_kl/distill.h"

namespace clk {

constexpr int64_t kMergeBlock = 1024;
constexpr double kMasked = -1e4;  // as in cl_kernels/distill_kl/reference.py

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory on a cache line, uninitialised.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(::operator new(static_cast<size_t>(bytes), std::align_val_t(64))) {}
  Buffer(Buffer&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, std::align_val_t(64)); }
  template <typename C>
  C* as() const {
    return static_cast<C*>(memory_);
  }

 private:
  void* memory_;
};

inline double scalar(const Tensor& tensor) {
  return CLK_DISPATCH_FLOATING(tensor.scalar_type(), T, "logit_scale",
                               [&] { return static_cast<double>(load(data<T>(tensor))); });
}

// The inputs made contiguous, with everything that both passes derive from them.
struct Inputs {
  Tensor student, teacher, anchors;
  std::optional<Tensor> teacher_anchors;
  std::vector<char> weight;  // [K][N_padded]
  FeatureProblem problem{};
  double logit_scale = 1;

  Inputs(const Tensor& s, const Tensor& t, const Tensor& a, const std::optional<Tensor>& ta, const std::optional<Tensor>& w,
         const std::optional<Tensor>& tensor, double factor, double temperature, double rows, double columns, bool mask_diagonal)
      : student(torch::stable::contiguous(s)), teacher(torch::stable::contiguous(t)), anchors(torch::stable::contiguous(a)) {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 3 && anchors.dim() == 2 && student.size(0) > 0 && anchors.size(0) > 0 &&
                        student.size(1) == anchors.size(1) && teacher.size(1) == student.size(0),
                    "feature_distill_kl: expected student (N, d), teacher (K, N, d_t), anchors (M, d)");
    if (ta) teacher_anchors = torch::stable::contiguous(*ta);
    const Tensor& own = teacher_anchors ? *teacher_anchors : anchors;
    STD_TORCH_CHECK(own.dim() == 2 && own.size(0) == anchors.size(0) && own.size(1) == teacher.size(2),
                    "feature_distill_kl: the teacher's anchors do not fit the teacher or the anchors");
    const Tensor* others[] = {&teacher, &anchors, &own};
    for (const Tensor* other : others) {
      STD_TORCH_CHECK(other->scalar_type() == student.scalar_type(), "feature_distill_kl: features of different dtypes");
    }
    problem.dtype = dtype_of(student);
    problem.student = student.data_ptr();
    problem.teacher = teacher.data_ptr();
    problem.anchors = anchors.data_ptr();
    problem.teacher_anchors = teacher_anchors ? teacher_anchors->data_ptr() : nullptr;
    problem.N = student.size(0);
    problem.N_padded = up(problem.N, kBlockRows);
    problem.M = anchors.size(0);
    problem.K = teacher.size(0);
    problem.d = student.size(1);
    problem.d_t = teacher.size(2);
    logit_scale = factor * (tensor ? scalar(*tensor) : 1);
    problem.scale = logit_scale / temperature;
    problem.masked = kMasked / temperature;
    problem.rows = rows != 0;
    problem.columns = columns != 0;
    problem.mask_diagonal = mask_diagonal;
    problem.dtype == Dtype::f64 ? set_weight<double>(w) : set_weight<float>(w);
  }

  template <typename C>
  void set_weight(const std::optional<Tensor>& given) {
    const int64_t K = problem.K, N = problem.N;
    weight.assign(static_cast<size_t>(K * problem.N_padded) * sizeof(C), 0);
    C* to = reinterpret_cast<C*>(weight.data());
    std::optional<Tensor> from;
    if (given) {
      from = torch::stable::contiguous(*given);
      STD_TORCH_CHECK(from->scalar_type() == compute_type(student) && from->numel() == K * N,
                      "feature_distill_kl: weight must be (K, N) in the dtype of the arithmetic");
    }
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < N; ++n) to[k * problem.N_padded + n] = from ? data<C>(*from)[k * N + n] : C(1);
    }
    problem.weight = weight.data();
  }
};

// Sum of the losses at n positions, in blocks whose sums are added in order.
template <typename F>
double sum_losses(int64_t n, const F& loss_at) {
  std::vector<double> sums(static_cast<size_t>(parts(n, kMergeBlock)), 0.0);
  torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double sum = 0;
      for (int64_t i = b * kMergeBlock; i < std::min(n, (b + 1) * kMergeBlock); ++i) sum += loss_at(i);
      sums[static_cast<size_t>(b)] = sum;
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// gradient[i] = factor * Σ_g partial[g][i] in the dtype of the features; returns Σ_i features[i] Σ_g partial[g][i].
template <typename C>
double finish(Dtype dtype, const C* partial, int64_t groups, int64_t rows, int64_t d, int64_t padded, const void* features,
              void* gradient, double factor) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    std::vector<double> dots(static_cast<size_t>(rows), 0.0);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / d), [&](int64_t begin, int64_t end) {
      std::vector<C> sums(static_cast<size_t>(d));
      for (int64_t i = begin; i < end; ++i) {
        std::copy(partial + i * padded, partial + i * padded + d, sums.begin());
        for (int64_t g = 1; g < groups; ++g) {
          const C* part = partial + (g * rows + i) * padded;
          for (int64_t j = 0; j < d; ++j) sums[static_cast<size_t>(j)] += part[j];
        }
        double dot = 0;
        for (int64_t j = 0; features && j < d; ++j) {
          dot += static_cast<double>(sums[static_cast<size_t>(j)]) * load(static_cast<const T*>(features) + i * d + j);
        }
        for (int64_t j = 0; gradient && j < d; ++j) {
          store(static_cast<T*>(gradient) + i * d + j, static_cast<C>(factor) * sums[static_cast<size_t>(j)]);
        }
        dots[static_cast<size_t>(i)] = dot;
      }
    });
    double total = 0;
    for (double dot : dots) total += dot;
    return total;
  };
  switch (dtype) {
    case Dtype::f32: return run(static_cast<float*>(nullptr));
    case Dtype::f64: return run(static_cast<double*>(nullptr));
    case Dtype::bf16: return run(static_cast<BFloat16*>(nullptr));
    default: return run(static_cast<Half*>(nullptr));
  }
}

}  // namespace clk

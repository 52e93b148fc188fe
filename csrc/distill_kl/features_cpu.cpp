// Distillation from features on the CPU: the similarity matrix is cut into rectangles by its shape alone, each rectangle is one task,
// and what the tasks leave is merged in a fixed order. Results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/isa.h"
#include "distill_kl/distill.h"

namespace clk {
namespace {

constexpr double kMasked = -1e4;             // as in cl_kernels/distill_kl/reference.py
constexpr int64_t kPartialBytes = 64 << 20;  // bound of the partial gradients
constexpr int64_t kMergeBlock = 1024;

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Memory on a cache line, uninitialised.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(::operator new(static_cast<size_t>(bytes), std::align_val_t(64))) {}
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

// How the matrix is cut: rows and columns per task.
struct Cut {
  int64_t rows, columns, row_groups, column_groups;
};

Cut cut(const FeatureProblem& p, int64_t most_row_groups, int64_t most_column_groups) {
  const int64_t columns = std::clamp<int64_t>(parts(p.M, 256), 1, std::min<int64_t>(32, most_column_groups));
  Cut c{};
  c.columns = up(parts(p.M, columns), kBlockColumns);
  c.column_groups = parts(p.M, c.columns);
  const int64_t wanted = std::clamp<int64_t>(parts(64, c.column_groups), 1, most_row_groups);
  const int64_t rows = std::max(wanted, parts(p.N, 1024));  // the packed rows of a task stay within megabytes
  c.rows = up(parts(p.N, rows), kBlockRows);
  c.row_groups = parts(p.N, c.rows);
  return c;
}

double scalar(const Tensor& tensor) {
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

template <typename F>
void for_tasks(const FeatureProblem& p, const Cut& c, bool backward, const F& f) {
  torch::stable::parallel_for(0, c.row_groups * c.column_groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(CLK_CALL(feature_scratch, p, c.rows, backward));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row_group = i % c.row_groups, column_group = i / c.row_groups;
      FeatureTask task{};
      task.n0 = row_group * c.rows;
      task.n1 = std::min(p.N, task.n0 + c.rows);
      task.m0 = column_group * c.columns;
      task.m1 = std::min(p.M, task.m0 + c.columns);
      task.scratch = scratch.as<char>();
      f(task, row_group, column_group);
    }
  });
}

template <typename C>
C from_origin(C maximum) {
  return maximum == -std::numeric_limits<C>::infinity() ? C(0) : maximum;
}

// Merges the statistics of `groups` tasks at one position; `at` is the position in the first array, `n` the length of an array.
// Writes the log-sum-exps (and the teachers' mass, for columns) and returns the loss there without the factor T².
template <typename C>
double merge(const FeatureProblem& p, const C* at, int64_t groups, int64_t n, const C* weight, C* out, int64_t out_stride) {
  const int64_t group = (kStudentStats + kTeacherStats * p.K) * n;
  const bool columns = weight == nullptr;
  C m_s = at[0];
  for (int64_t g = 1; g < groups; ++g) m_s = std::max(m_s, at[g * group]);
  const C from_s = from_origin(m_s);
  double sum_s = 0;
  for (int64_t g = 0; g < groups; ++g) sum_s += at[g * group + n] * std::exp(static_cast<double>(at[g * group]) - from_s);
  out[0] = static_cast<C>(m_s + std::log(sum_s));
  double loss = 0, total_mass = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    const C* t = at + (kStudentStats + k * kTeacherStats) * n;
    C m_t = t[0];
    for (int64_t g = 1; g < groups; ++g) m_t = std::max(m_t, t[g * group]);
    const C from_t = from_origin(m_t);
    double sum = 0, mass = 0, cross = 0, entropy = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const C* part = t + g * group;
      const double shrink = std::exp(static_cast<double>(part[0]) - from_t);
      const double part_mass = columns ? part[2 * n] : part[n];
      sum += shrink * part[n];
      mass += shrink * part_mass;
      cross += shrink * (part[3 * n] + part_mass * (from_origin(at[g * group]) - from_s));
      entropy += shrink * (part[4 * n] + part_mass * (from_origin(part[0]) - from_t));
    }
    double term = mass * std::log(sum_s) - cross;
    if (p.kl) term += entropy - mass * std::log(sum);
    loss += (columns ? 1.0 : static_cast<double>(weight[k * p.N_padded])) * term / sum;
    total_mass += mass / sum;
    out[(k + (columns ? 2 : 1)) * out_stride] = static_cast<C>(m_t + std::log(sum));
  }
  if (columns) out[out_stride] = static_cast<C>(total_mass);
  return loss;
}

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

// The part [from, to) of every statistic's array becomes empty: maxima (the first statistic of student and teachers) at -inf.
template <typename C>
void clear(C* stats, int64_t K, int64_t n, int64_t from, int64_t to) {
  for (int64_t s = 0; s < kStudentStats + kTeacherStats * K; ++s) {
    const bool maximum = s == 0 || (s >= kStudentStats && (s - kStudentStats) % kTeacherStats == 0);
    std::fill(stats + s * n + from, stats + s * n + to, maximum ? -std::numeric_limits<C>::infinity() : C(0));
  }
}

template <typename C>
double forward(const FeatureProblem& p, double temperature, double rows, double columns, C* row_stats, C* column_stats) {
  const Cut c = cut(p, parts(p.N, kBlockRows), p.M);
  const int64_t stats = kStudentStats + kTeacherStats * p.K;
  const Buffer row_parts(p.rows ? c.column_groups * stats * p.N_padded * sizeof(C) : 1);
  const Buffer column_parts(p.columns ? c.row_groups * stats * p.M * sizeof(C) : 1);
  for_tasks(p, c, false, [&](FeatureTask& task, int64_t row_group, int64_t column_group) {
    C* r = row_parts.as<C>() + column_group * stats * p.N_padded;
    C* m = column_parts.as<C>() + row_group * stats * p.M;
    if (p.rows) clear(r, p.K, p.N_padded, task.n0, up(task.n1, kBlockRows));
    if (p.columns) clear(m, p.K, p.M, task.m0, task.m1);
    task.rows = r;
    task.columns = m;
    CLK_CALL(feature_forward, p, task);
  });
  double loss = 0;
  if (p.rows) {
    const C* weight = static_cast<const C*>(p.weight);
    loss += rows / p.N * sum_losses(p.N, [&](int64_t i) {
      return merge<C>(p, row_parts.as<C>() + i, c.column_groups, p.N_padded, weight + i, row_stats + i, p.N);
    });
  }
  if (p.columns) {
    loss += columns / p.M * sum_losses(p.M, [&](int64_t i) {
      return merge<C>(p, column_parts.as<C>() + i, c.row_groups, p.M, nullptr, column_stats + i, p.M);
    });
  }
  return temperature * temperature * loss;
}

// Rows [1 + K][N] copied to [1 + K][N_padded], and Σ_k w behind them.
template <typename C>
std::vector<C> padded_rows(const FeatureProblem& p, const C* stats) {
  std::vector<C> out(static_cast<size_t>((2 + p.K) * p.N_padded), C(0));
  for (int64_t s = 0; s < 1 + p.K && p.rows; ++s) std::copy(stats + s * p.N, stats + (s + 1) * p.N, out.begin() + s * p.N_padded);
  C* total = out.data() + (1 + p.K) * p.N_padded;
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t n = 0; n < p.N; ++n) total[n] += static_cast<const C*>(p.weight)[k * p.N_padded + n];
  }
  return out;
}

// gradient[i] = factor * Σ_g partial[g][i] in the dtype of the features; returns Σ_i features[i] Σ_g partial[g][i].
template <typename C>
double finish(Dtype dtype, const C* partial, int64_t groups, int64_t rows, int64_t d, int64_t padded, const void* features,
              void* gradient, double factor) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    std::vector<double> dots(static_cast<size_t>(rows), 0.0);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double dot = 0;
        for (int64_t j = 0; j < d; ++j) {
          C sum = 0;
          for (int64_t g = 0; g < groups; ++g) sum += partial[(g * rows + i) * padded + j];
          if (features) dot += static_cast<double>(sum) * load(static_cast<const T*>(features) + i * d + j);
          if (gradient) store(static_cast<T*>(gradient) + i * d + j, static_cast<C>(factor) * sum);
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor> feature_distill_kl_cpu(Tensor student, Tensor teacher, Tensor anchors,
                                                          std::optional<Tensor> teacher_anchors, std::optional<Tensor> weight,
                                                          std::optional<Tensor> logit_scale, double factor, double temperature,
                                                          double rows, double columns, bool kl, bool mask_diagonal) {
  Inputs in(student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns, mask_diagonal);
  in.problem.kl = kl;
  const FeatureProblem& p = in.problem;
  const ScalarType type = compute_type(student);
  Tensor loss = torch::stable::new_empty(student, std::vector<int64_t>{}, type);
  Tensor row_stats = torch::stable::new_empty(student, std::vector<int64_t>{1 + p.K, p.rows ? p.N : 0}, type);
  Tensor column_stats = torch::stable::new_empty(student, std::vector<int64_t>{2 + p.K, p.columns ? p.M : 0}, type);
  if (p.dtype == Dtype::f64) {
    *data<double>(loss) = forward(p, temperature, rows, columns, data<double>(row_stats), data<double>(column_stats));
  } else {
    *data<float>(loss) =
        static_cast<float>(forward(p, temperature, rows, columns, data<float>(row_stats), data<float>(column_stats)));
  }
  return {loss, row_stats, column_stats};
}

namespace {

template <typename C>
void backward(const Inputs& in, double grad, double rows, double columns, double temperature, double factor,
              const Tensor& row_stats, const Tensor& column_stats, bool need_anchors, void* grad_student, void* grad_anchors,
              C* grad_scale) {
  const FeatureProblem& p = in.problem;
  const int64_t padded = CLK_CALL(feature_padded, p, p.d);
  const int64_t line = padded * static_cast<int64_t>(sizeof(C));
  FeatureBackward b{};
  b.need_anchors = need_anchors;
  b.need_rows = grad_student != nullptr || grad_scale != nullptr;
  b.row_factor = rows * temperature / p.N;
  b.column_factor = columns * temperature / p.M;
  const std::vector<C> row_lines = padded_rows<C>(p, data<C>(row_stats));
  b.row_stats = row_lines.data();
  b.row_weight = row_lines.data() + (1 + p.K) * p.N_padded;
  b.column_stats = column_stats.data_ptr();
  const int64_t most_columns = b.need_rows ? std::max<int64_t>(1, kPartialBytes / (p.N * line)) : p.M;
  const int64_t most_rows = need_anchors ? std::max<int64_t>(1, kPartialBytes / (p.M * line)) : p.N;
  const Cut c = cut(p, std::min(most_rows, parts(p.N, kBlockRows)), most_columns);
  const Buffer row_parts(b.need_rows ? c.column_groups * p.N * line : 1);
  const Buffer column_parts(need_anchors ? c.row_groups * p.M * line : 1);
  for_tasks(p, c, true, [&](FeatureTask& task, int64_t row_group, int64_t column_group) {
    C* r = row_parts.as<C>() + column_group * p.N * padded;
    C* m = column_parts.as<C>() + row_group * p.M * padded;
    if (b.need_rows) std::fill(r + task.n0 * padded, r + task.n1 * padded, C(0));
    if (need_anchors) std::fill(m + task.m0 * padded, m + task.m1 * padded, C(0));
    task.rows = r;
    task.columns = m;
    CLK_CALL(feature_backward, p, task, b);
  });
  const double outer = grad * in.logit_scale;
  if (b.need_rows) {
    const double dot = finish<C>(p.dtype, row_parts.as<C>(), c.column_groups, p.N, p.d, padded,
                                 grad_scale ? p.student : nullptr, grad_student, outer);
    if (grad_scale) *grad_scale = static_cast<C>(grad * factor * dot);
  }
  if (need_anchors) finish<C>(p.dtype, column_parts.as<C>(), c.row_groups, p.M, p.d, padded, nullptr, grad_anchors, outer);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> feature_distill_kl_backward_cpu(
    Tensor grad, Tensor student, Tensor teacher, Tensor anchors, std::optional<Tensor> teacher_anchors,
    std::optional<Tensor> weight, std::optional<Tensor> logit_scale, Tensor row_stats, Tensor column_stats, double factor,
    double temperature, double rows, double columns, bool mask_diagonal, bool need_student, bool need_anchors, bool need_scale) {
  const Inputs in(student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns, mask_diagonal);
  const FeatureProblem& p = in.problem;
  row_stats = torch::stable::contiguous(row_stats);
  column_stats = torch::stable::contiguous(column_stats);
  STD_TORCH_CHECK(row_stats.numel() == (1 + p.K) * (p.rows ? p.N : 0) && column_stats.numel() == (2 + p.K) * (p.columns ? p.M : 0) &&
                      row_stats.scalar_type() == compute_type(student) && column_stats.scalar_type() == compute_type(student),
                  "feature_distill_kl_backward: the statistics do not belong to these features");
  const auto gradient = [&](bool needed, const Tensor& of, int64_t n) {
    return torch::stable::new_empty(of, needed ? std::vector<int64_t>{n, p.d} : std::vector<int64_t>{0});
  };
  Tensor grad_student = gradient(need_student, student, p.N), grad_anchors = gradient(need_anchors, anchors, p.M);
  Tensor grad_scale = torch::stable::new_empty(row_stats, need_scale ? std::vector<int64_t>{} : std::vector<int64_t>{0});
  const auto run = [&](auto* scale) {
    using C = std::remove_pointer_t<decltype(scale)>;
    backward<C>(in, scalar(grad), rows, columns, temperature, factor, row_stats, column_stats, need_anchors,
                need_student ? grad_student.data_ptr() : nullptr, need_anchors ? grad_anchors.data_ptr() : nullptr,
                need_scale ? scale : nullptr);
  };
  p.dtype == Dtype::f64 ? run(data<double>(grad_scale)) : run(data<float>(grad_scale));
  return {grad_student, grad_anchors, grad_scale};
}

}  // namespace clk

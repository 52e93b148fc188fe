// Distillation from features on the CPU: the similarity matrix is cut into rectangles by its shape alone, each rectangle is one task,
// and what the tasks leave is merged in a fixed order. Results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "distill_kl/bounded_driver.h"

namespace clk {
namespace {

constexpr int64_t kPartialBytes = 64 << 20;  // bound of the partial gradients

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

template <typename C>
void backward(const Inputs& in, const FeatureFactors& f, const C* row_stats, const C* column_stats, PartialGradients& out) {
  const FeatureProblem& p = in.problem;
  const bool need_rows = out.need_rows, need_columns = out.need_columns;
  const int64_t padded = CLK_CALL(feature_padded, p, p.d);
  const int64_t line = padded * static_cast<int64_t>(sizeof(C));
  FeatureBackward b{};
  b.need_anchors = need_columns;
  b.need_rows = need_rows;
  b.row_factor = f.rows * f.temperature / p.N;
  b.column_factor = f.columns * f.temperature / p.M;
  const std::vector<C> row_lines = padded_rows<C>(p, row_stats);
  b.row_stats = row_lines.data();
  b.row_weight = row_lines.data() + (1 + p.K) * p.N_padded;
  b.column_stats = column_stats;
  const int64_t most_columns = need_rows ? std::max<int64_t>(1, kPartialBytes / (p.N * line)) : p.M;
  const int64_t most_rows = need_columns ? std::max<int64_t>(1, kPartialBytes / (p.M * line)) : p.N;
  const Cut c = cut(p, std::min(most_rows, parts(p.N, kBlockRows)), most_columns);
  out.line = padded;
  out.row_parts = c.column_groups;
  out.column_parts = c.row_groups;
  out.rows.emplace(need_rows ? c.column_groups * p.N * line : 1);
  out.columns.emplace(need_columns ? c.row_groups * p.M * line : 1);
  for_tasks(p, c, true, [&](FeatureTask& task, int64_t row_group, int64_t column_group) {
    C* r = out.rows->as<C>() + column_group * p.N * padded;
    C* m = out.columns->as<C>() + row_group * p.M * padded;
    if (need_rows) std::fill(r + task.n0 * padded, r + task.n1 * padded, C(0));
    if (need_columns) std::fill(m + task.m0 * padded, m + task.m1 * padded, C(0));
    task.rows = r;
    task.columns = m;
    CLK_CALL(feature_backward, p, task, b);
  });
}

// Loss and the gradients that are needed or, where none is, log-sum-exps, whatever the logits.
template <typename C>
double any_forward(const Inputs& in, const FeatureFactors& f, C* row_stats, C* column_stats, PartialGradients& gradients) {
  const FeatureProblem& p = in.problem;
  double loss = 0;
  if (bounded_forward(in, f, &loss, row_stats, column_stats, gradients)) return loss;
  if (!gradients.need_rows && !gradients.need_columns) return forward(p, f.temperature, f.rows, f.columns, row_stats, column_stats);
  std::vector<C> rows(static_cast<size_t>((1 + p.K) * p.N)), columns(static_cast<size_t>((2 + p.K) * p.M));
  loss = forward(p, f.temperature, f.rows, f.columns, rows.data(), columns.data());
  backward<C>(in, f, rows.data(), columns.data(), gradients);
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feature_distill_kl_cpu(
    Tensor student, Tensor teacher, Tensor anchors, std::optional<Tensor> teacher_anchors, std::optional<Tensor> weight,
    std::optional<Tensor> logit_scale, double factor, double temperature, double rows, double columns, bool kl, bool mask_diagonal,
    bool need_student, bool need_anchors) {
  Inputs in(student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns, mask_diagonal);
  in.problem.kl = kl;
  const FeatureProblem& p = in.problem;
  const bool statistics = !need_student && !need_anchors;
  const auto empty = [&](const std::vector<int64_t>& shape) { return torch::stable::new_empty(student, shape, compute_type(student)); };
  const auto gradient = [&](bool needed, int64_t n) { return needed ? empty({n, p.d}) : empty({0}); };
  Tensor loss = empty({}), student_gradient = gradient(need_student, p.N), anchors_gradient = gradient(need_anchors, p.M);
  Tensor row_stats = empty({1 + p.K, p.rows && statistics ? p.N : 0});
  Tensor column_stats = empty({2 + p.K, p.columns && statistics ? p.M : 0});
  const auto run = [&](auto* to, Dtype dtype) {
    using C = std::remove_pointer_t<decltype(to)>;
    PartialGradients partial{need_student, need_anchors};
    *to = static_cast<C>(any_forward<C>(in, {rows, columns, temperature}, data<C>(row_stats), data<C>(column_stats), partial));
    if (need_student) {
      finish<C>(dtype, partial.rows->template as<C>(), partial.row_parts, p.N, p.d, partial.line, nullptr, student_gradient.data_ptr(), 1.0);
    }
    if (need_anchors) {
      finish<C>(dtype, partial.columns->template as<C>(), partial.column_parts, p.M, p.d, partial.line, nullptr,
                anchors_gradient.data_ptr(), 1.0);
    }
  };
  p.dtype == Dtype::f64 ? run(data<double>(loss), Dtype::f64) : run(data<float>(loss), Dtype::f32);
  return {loss, row_stats, column_stats, student_gradient, anchors_gradient};
}

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
  const bool need_rows = need_student || need_scale;
  const double upstream = scalar(grad), outer = upstream * in.logit_scale;
  const auto run = [&](auto* scale) {
    using C = std::remove_pointer_t<decltype(scale)>;
    const FeatureFactors f{rows, columns, temperature};
    PartialGradients partial{need_rows, need_anchors};
    if (!bounded_backward(in, f, row_stats.data_ptr(), column_stats.data_ptr(), partial)) {
      backward<C>(in, f, data<C>(row_stats), data<C>(column_stats), partial);
    }
    if (need_rows) {
      const double dot = finish<C>(p.dtype, partial.rows->as<C>(), partial.row_parts, p.N, p.d, partial.line,
                                   need_scale ? p.student : nullptr, need_student ? grad_student.data_ptr() : nullptr, outer);
      if (need_scale) *scale = static_cast<C>(upstream * factor * dot);
    }
    if (need_anchors) {
      finish<C>(p.dtype, partial.columns->as<C>(), partial.column_parts, p.M, p.d, partial.line, nullptr, grad_anchors.data_ptr(), outer);
    }
  };
  p.dtype == Dtype::f64 ? run(data<double>(grad_scale)) : run(data<float>(grad_scale));
  return {grad_student, grad_anchors, grad_scale};
}

}  // namespace clk

// Distillation from features with bounded logits: one sweep over the similarity matrix for the sums, one for the gradient, with as many
// exponentials kept in between as a fixed buffer holds. Cuts and the order of every sum depend on the shapes alone.
#include <atomic>
#include <cmath>

#include "common/isa.h"
#include "distill_kl/bounded.h"
#include "distill_kl/bounded_driver.h"

namespace clk {
namespace {

constexpr int64_t kMemory = 20 << 20;        // that a call takes altogether where it can, exponentials between the sweeps included
constexpr int64_t kPartialBytes = 4 << 20;   // of partial gradients of the student
constexpr int64_t kMostPartials = 64 << 20;  // the same where the anchors' gradients leave no other way to share the work
constexpr int64_t kTasks = 32;
constexpr int64_t kGroupColumns = kBlockColumns;  // at least, for a task: a few hundred captions are work for several threads
constexpr double kLn2 = 0.6931471805599453, kLog2E = 1.4426950408889634;

// A softmax over one entry is exactly 1, which only the general kernels' differences from the maximum give.
bool applies(const FeatureProblem& p) {
  const bool masked = !p.mask_diagonal || p.masked * kLog2E < kMaskedPower;
  return (p.rows || p.columns) && p.N > 1 && p.M > 1 && masked && std::isfinite(p.scale);
}

int64_t element_size(const FeatureProblem& p) { return p.dtype == Dtype::f64 ? 8 : 4; }
int64_t row_blocks(const FeatureProblem& p) { return p.N_padded / kBlockRows; }

bool weights_differ(const FeatureProblem& p) {
  const auto differ = [&](const auto* w) {
    for (int64_t k = 0; k < p.K; ++k) {
      for (int64_t n = 0; n < p.N; ++n) {
        if (w[k * p.N_padded + n] != 1) return true;
      }
    }
    return false;
  };
  return p.dtype == Dtype::f64 ? differ(static_cast<const double*>(p.weight)) : differ(static_cast<const float*>(p.weight));
}

struct Groups {
  int64_t rows, columns;
};

// f(task, row group, column group) for every rectangle, false as soon as one says so.
template <typename F>
bool for_rectangles(const FeatureProblem& p, Groups groups, const F& f) {
  std::atomic<bool> fine{true};
  const int64_t blocks = parts(p.M, kBlockColumns);
  torch::stable::parallel_for(0, groups.rows * groups.columns, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(CLK_CALL(bounded_scratch, p));
    for (int64_t i = begin; i < end && fine.load(std::memory_order_relaxed); ++i) {
      const int64_t r = i % groups.rows, c = i / groups.rows;
      BoundedTask task{};
      task.first = row_blocks(p) * r / groups.rows;
      task.last = row_blocks(p) * (r + 1) / groups.rows;
      task.m0 = blocks * c / groups.columns * kBlockColumns;
      task.m1 = std::min(p.M, blocks * (c + 1) / groups.columns * kBlockColumns);
      task.scratch = scratch.as<char>();
      if (!f(task, r, c)) fine.store(false, std::memory_order_relaxed);
    }
  });
  return fine.load();
}

Groups sums_groups(const FeatureProblem& p) {
  const int64_t columns = std::clamp<int64_t>(p.M / kGroupColumns, 1, kTasks);
  return {std::min(parts(kTasks, columns), row_blocks(p)), columns};
}

Groups gradient_groups(const FeatureProblem& p, bool need_rows, bool need_columns) {
  const int64_t line = CLK_CALL(bounded_line, p) * element_size(p);
  const int64_t bound = need_columns ? kMostPartials : kPartialBytes;
  const int64_t most = need_rows ? std::clamp<int64_t>(bound / (p.N * line), 1, kTasks) : kTasks;
  const int64_t columns = std::clamp<int64_t>(p.M / kGroupColumns, 1, most);
  const int64_t rows = std::min(parts(kTasks, columns), row_blocks(p));
  return {need_columns ? std::min(rows, std::max<int64_t>(1, kMostPartials / (p.M * line))) : rows, columns};
}

// How many bytes of exponentials the first sweep may leave to the second: what is left beside everything else.
int64_t kept_bytes(const FeatureProblem& p, Groups sums, bool need_rows, bool need_columns) {
  const Groups groups = gradient_groups(p, need_rows, need_columns);
  const int64_t line = CLK_CALL(bounded_line, p) * element_size(p), K = p.K;
  const int64_t of_sums = (sums.columns * (1 + 2 * K) * p.N_padded + sums.rows * (1 + 3 * K) * p.M) * static_cast<int64_t>(sizeof(double));
  const int64_t of_gradients = (need_rows ? groups.columns * p.N * line : 0) + (need_columns ? groups.rows * p.M * line : 0);
  const int64_t of_rows = p.N_padded * (p.d + K * p.d_t) * element_size(p), of_factors = (1 + K) * (p.N_padded + p.M) * element_size(p);
  return std::max<int64_t>(0, kMemory - of_rows - of_factors - std::max(of_sums, of_gradients));
}

// The rows of all blocks, packed.
Buffer pack(const FeatureProblem& p) {
  Buffer packed(row_blocks(p) * kBlockRows * (p.d + p.K * p.d_t) * element_size(p));
  torch::stable::parallel_for(0, row_blocks(p), 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) CLK_CALL(bounded_pack, p, block, packed.as<char>());
  });
  return packed;
}

bool gradient_sweep(const BoundedProblem& b, const void* row_factors, const void* column_factors, PartialGradients& out) {
  const FeatureProblem& p = *b.features;
  const Groups groups = gradient_groups(p, out.need_rows, out.need_columns);
  out.line = CLK_CALL(bounded_line, p);
  out.row_parts = groups.columns;
  out.column_parts = groups.rows;
  const int64_t row_bytes = p.N * out.line * element_size(p), column_bytes = p.M * out.line * element_size(p);
  if (out.need_rows) out.rows.emplace(groups.columns * row_bytes);
  if (out.need_columns) out.columns.emplace(groups.rows * column_bytes);
  return for_rectangles(p, groups, [&](const BoundedTask& task, int64_t r, int64_t c) {
    BoundedGradient gradient{row_factors, column_factors, nullptr, nullptr};
    if (out.need_rows) gradient.rows = out.rows->as<char>() + c * row_bytes;
    if (out.need_columns) gradient.columns = out.columns->as<char>() + r * column_bytes;
    return CLK_CALL(bounded_gradient, b, task, gradient);
  });
}

template <typename C>
bool forward(const Inputs& in, const FeatureFactors& f, double* loss, C* row_stats, C* column_stats, PartialGradients& gradients) {
  const FeatureProblem& p = in.problem;
  const bool gradient = gradients.need_rows || gradients.need_columns;
  if (gradient) row_stats = column_stats = nullptr;
  const int64_t K = p.K, N = p.N_padded, M = p.M;
  const Buffer packed = pack(p);
  BoundedProblem b{&p, packed.as<char>(), nullptr, 0, weights_differ(p)};
  const int64_t column_bytes = N * (1 + K) * element_size(p);
  const Groups groups = sums_groups(p);
  if (gradient) {
    const int64_t bytes = kept_bytes(p, groups, gradients.need_rows, gradients.need_columns);
    b.kept_columns = std::min(M, bytes / column_bytes / kBlockColumns * kBlockColumns);
  }
  if (b.kept_columns < M / 8) b.kept_columns = 0;
  const Buffer kept(b.kept_columns * column_bytes + 1);
  b.kept = kept.as<char>();

  const int64_t row_arrays = 1 + 2 * K, column_arrays = 1 + 3 * K;
  std::vector<double> row_sums(static_cast<size_t>(groups.columns * row_arrays * N), 0.0);
  std::optional<Buffer> column_sums(std::in_place, groups.rows * column_arrays * M * static_cast<int64_t>(sizeof(double)));
  const bool bounded = for_rectangles(p, groups, [&](const BoundedTask& task, int64_t r, int64_t c) {
    const BoundedSums sums{row_sums.data() + c * row_arrays * N, column_sums->as<double>() + r * column_arrays * M};
    return CLK_CALL(bounded_sums, b, task, sums);
  });
  if (!bounded) return false;

  const C* weight = static_cast<const C*>(p.weight);
  std::vector<C> row_factors(static_cast<size_t>((1 + K) * N), C(0)), column_factors(static_cast<size_t>(gradient ? (1 + K) * M : 0));
  const double row_factor = f.rows * f.temperature / p.N, column_factor = f.columns * f.temperature / M;
  const auto total = [](const double* at, int64_t count, int64_t stride) {
    double sum = at[0];
    for (int64_t g = 1; g < count; ++g) sum += at[g * stride];
    return sum;
  };
  *loss = 0;
  if (p.rows) {
    *loss += f.rows / p.N * sum_losses(p.N, [&](int64_t n) {
      const auto sum = [&](int64_t s) { return total(row_sums.data() + s * N + n, groups.columns, row_arrays * N); };
      const double student = sum(0), log_student = std::log(student);
      double at_row = 0, weights = 0;
      if (row_stats) row_stats[n] = static_cast<C>(log_student);
      for (int64_t k = 0; k < K; ++k) {
        const double teacher = sum(1 + 2 * k), w = weight[k * N + n];
        const double log_teacher = p.kl || row_stats ? std::log(teacher) : 0;
        at_row += w * (log_student - (p.kl ? log_teacher : 0) - kLn2 * sum(2 + 2 * k) / teacher);
        weights += w;
        row_factors[static_cast<size_t>((1 + k) * N + n)] = static_cast<C>(row_factor * w / teacher);
        if (row_stats) row_stats[(1 + k) * p.N + n] = static_cast<C>(log_teacher);
      }
      row_factors[static_cast<size_t>(n)] = static_cast<C>(row_factor * weights / student);
      return at_row;
    });
  }
  if (p.columns) {
    *loss += f.columns / M * sum_losses(M, [&](int64_t m) {
      const auto sum = [&](int64_t s) { return total(column_sums->as<double>() + s * M + m, groups.rows, column_arrays * M); };
      const double student = sum(0), log_student = std::log(student);
      double at_column = 0, masses = 0;
      if (column_stats) column_stats[m] = static_cast<C>(log_student);
      for (int64_t k = 0; k < K; ++k) {
        const double teacher = sum(1 + 3 * k), mass = sum(2 + 3 * k);
        const double log_teacher = p.kl || column_stats ? std::log(teacher) : 0;
        at_column += (mass * (log_student - (p.kl ? log_teacher : 0)) - kLn2 * sum(3 + 3 * k)) / teacher;
        masses += mass / teacher;
        if (gradient) column_factors[static_cast<size_t>((1 + k) * M + m)] = static_cast<C>(column_factor / teacher);
        if (column_stats) column_stats[(2 + k) * M + m] = static_cast<C>(log_teacher);
      }
      if (gradient) column_factors[static_cast<size_t>(m)] = static_cast<C>(column_factor * masses / student);
      if (column_stats) column_stats[M + m] = static_cast<C>(masses);
      return at_column;
    });
  }
  *loss *= f.temperature * f.temperature;
  column_sums.reset();  // before the gradients take their memory
  return !gradient || gradient_sweep(b, row_factors.data(), column_factors.data(), gradients);
}

template <typename C>
bool backward(const Inputs& in, const FeatureFactors& f, const C* row_stats, const C* column_stats,
              PartialGradients& gradients) {
  const FeatureProblem& p = in.problem;
  const int64_t K = p.K, N = p.N_padded, M = p.M;
  std::vector<C> row_factors(static_cast<size_t>((1 + K) * N), C(0)), column_factors(static_cast<size_t>((1 + K) * M), C(0));
  const C* weight = static_cast<const C*>(p.weight);
  const auto inverse = [](C log_sum) { return std::exp(-static_cast<double>(log_sum)); };
  const double row_factor = f.rows * f.temperature / p.N, column_factor = f.columns * f.temperature / M;
  for (int64_t n = 0; n < p.N && p.rows; ++n) {
    double weights = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double w = weight[k * N + n];
      weights += w;
      row_factors[static_cast<size_t>((1 + k) * N + n)] = static_cast<C>(row_factor * w * inverse(row_stats[(1 + k) * p.N + n]));
    }
    row_factors[static_cast<size_t>(n)] = static_cast<C>(row_factor * weights * inverse(row_stats[n]));
  }
  for (int64_t m = 0; m < M && p.columns; ++m) {
    column_factors[static_cast<size_t>(m)] = static_cast<C>(column_factor * column_stats[M + m] * inverse(column_stats[m]));
    for (int64_t k = 0; k < K; ++k) {
      column_factors[static_cast<size_t>((1 + k) * M + m)] = static_cast<C>(column_factor * inverse(column_stats[(2 + k) * M + m]));
    }
  }
  const Buffer packed = pack(p);
  const BoundedProblem b{&p, packed.as<char>(), nullptr, 0, true};
  return gradient_sweep(b, row_factors.data(), column_factors.data(), gradients);
}

}  // namespace

bool bounded_forward(const Inputs& in, const FeatureFactors& f, double* loss, void* row_stats, void* column_stats,
                     PartialGradients& gradients) {
  if (!applies(in.problem)) return false;
  const auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    return forward<C>(in, f, loss, static_cast<C*>(row_stats), static_cast<C*>(column_stats), gradients);
  };
  return in.problem.dtype == Dtype::f64 ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

bool bounded_backward(const Inputs& in, const FeatureFactors& f, const void* row_stats, const void* column_stats,
                      PartialGradients& gradients) {
  if (!applies(in.problem)) return false;
  const auto run = [&](auto* typed) {
    using C = std::remove_pointer_t<decltype(typed)>;
    return backward<C>(in, f, static_cast<const C*>(row_stats), static_cast<const C*>(column_stats), gradients);
  };
  return in.problem.dtype == Dtype::f64 ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

}  // namespace clk

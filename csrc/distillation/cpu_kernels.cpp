// Compiled once per instruction set, see common/isa.h. Gradients of the distillation in both logits z_s and z_t, divided by T:
//   of the student's   factor (p_s − p_t)
//   of the teacher's   factor p_t (Σ p_t z_s − z_s), and 0 where p_t is 0, whatever the student says there
// The sum in the second comes from the same p_t and z_s as what is taken from it: with one p_t near 1 nothing else cancels them.
#include "distillation/cpu_kernels.h"

#include "distill_kl/logits.h"

namespace clk {
namespace {

constexpr int64_t kSteps = 128;  // of sums in the compute type before they go into fp64

// Statistics of one slice, or of neighbouring ones, that lie `next` (0 or 1) apart; mean: Σ p_t z_s.
template <typename C>
struct SliceStatistics {
  const C *max_s, *log_s, *max_t, *log_t;
  C* mean;
  int64_t next;

  Vec<C> at(const C* from, int64_t i) const { return next ? load_vector(from + i) : splat(*from); }
  Vec<C> teacher(Vec<C> z, int64_t i) const { return exponential((z - at(max_t, i)) - at(log_t, i)); }
  Vec<C> student(Vec<C> z, int64_t i) const { return exponential((z - at(max_s, i)) - at(log_s, i)); }
};

// n <= kBuffer logits of each side from these offsets on, divided by T; lanes behind them have no mass.
template <typename C>
struct Row {
  C zs[kBuffer], zt[kBuffer];
  int64_t n;

  void read(const LogitsProblem& p, int64_t from_s, int64_t from_t, int64_t count) {
    constexpr int64_t W = kLanes<C>;
    n = count;
    const C inverse = static_cast<C>(1 / p.temperature);
    fetch(zs, p.student, from_s, n, inverse);
    fetch(zt, p.teacher, from_t, n, inverse);
    for (int64_t i = n; i < (n + W - 1) / W * W; ++i) zs[i] = 0, zt[i] = -kInfinity<C>;
  }

  // mass += p_t and sum += p_t z_s at i.
  void add(const SliceStatistics<C>& of, int64_t i, Vec<C>& mass, Vec<C>& sum) const {
    const Vec<C> p_t = of.teacher(load_vector(zt + i), i);
    mass += p_t;
    sum += p_t == 0 ? Vec<C>{} : p_t * load_vector(zs + i);
  }

  // Gradients in the place of the logits, then to `to`.
  void write(const DistillationGradients& g, const SliceStatistics<C>& of, int64_t to) {
    const Vec<C> factor = splat(static_cast<C>(g.factor));
    for (int64_t i = 0; i < n; i += kLanes<C>) {
      const Vec<C> z = load_vector(zs + i), p_t = of.teacher(load_vector(zt + i), i);
      if (g.student != nullptr) store_vector(zs + i, factor * (of.student(z, i) - p_t));
      if (g.teacher != nullptr) store_vector(zt + i, p_t == 0 ? Vec<C>{} : factor * p_t * (of.at(of.mean, i) - z));
    }
    if (g.student != nullptr) put(g.logits.student.dtype, g.student, to, zs, n);
    if (g.teacher != nullptr) put(g.logits.teacher.dtype, g.teacher, to, zt, n);
  }
};

template <typename C>
inline void gradients_of_slice(const DistillationGradients& g, int64_t slice) {
  const LogitsProblem& p = g.logits;
  const C* stats = static_cast<const C*>(p.stats) + slice;
  C mean = 0;
  const SliceStatistics<C> of{stats, stats + p.slices, stats + 2 * p.slices, stats + 3 * p.slices, &mean, 0};
  Row<C> row;
  const auto read = [&](int64_t start) {
    row.read(p, slice * p.student.outer + start, slice * p.teacher.outer + start, p.M - start < kBuffer ? p.M - start : kBuffer);
  };
  double total = 0, sums = 0;
  for (int64_t start = 0; g.teacher != nullptr && start < p.M; start += kBuffer) {
    read(start);
    Vec<C> mass{}, sum{};
    for (int64_t i = 0; i < row.n; i += kLanes<C>) row.add(of, i, mass, sum);
    total += sum_lanes<C>(mass);
    sums += sum_lanes<C>(sum);
  }
  mean = static_cast<C>(sums / total);
  for (int64_t start = 0; start < p.M; start += kBuffer) {
    read(start);
    row.write(g, of, slice * p.M + start);
  }
}

template <typename C>
inline void gradients_of_block(const DistillationGradients& g, int64_t outer, int64_t inner, int64_t width) {
  const LogitsProblem& p = g.logits;
  constexpr int64_t W = kLanes<C>;
  C stats[4][kInnerBlock] = {}, mean[kInnerBlock] = {};
  for (int64_t i = 0; i < width; ++i) {
    for (int s = 0; s < 4; ++s) stats[s][i] = static_cast<const C*>(p.stats)[s * p.slices + outer * p.inner + inner + i];
  }
  const SliceStatistics<C> of{stats[0], stats[1], stats[2], stats[3], mean, 1};
  Row<C> row;
  const auto read = [&](int64_t m) {
    row.read(p, outer * p.student.outer + m * p.student.step + inner, outer * p.teacher.outer + m * p.teacher.step + inner, width);
  };
  double total[kInnerBlock] = {}, sums[kInnerBlock] = {};
  for (int64_t start = 0; g.teacher != nullptr && start < p.M; start += kSteps) {
    Vec<C> mass[kInnerBlock / W] = {}, sum[kInnerBlock / W] = {};
    for (int64_t m = start; m < p.M && m < start + kSteps; ++m) {
      read(m);
      for (int64_t i = 0; i < width; i += W) row.add(of, i, mass[i / W], sum[i / W]);
    }
    for (int64_t i = 0; i < width; ++i) {
      total[i] += static_cast<double>(mass[i / W][i % W]);
      sums[i] += static_cast<double>(sum[i / W][i % W]);
    }
  }
  for (int64_t i = 0; i < width; ++i) mean[i] = static_cast<C>(sums[i] / total[i]);
  for (int64_t m = 0; m < p.M; ++m) {
    read(m);
    row.write(g, of, (outer * p.M + m) * p.inner + inner);
  }
}

// Units as in distill_kl/logits.h.
template <typename C>
inline void run_gradients(const DistillationGradients& g, int64_t begin, int64_t end) {
  const int64_t length = g.logits.inner, blocks = (length + kInnerBlock - 1) / kInnerBlock;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (length == 1) {
      gradients_of_slice<C>(g, unit);
    } else {
      const int64_t inner = unit % blocks * kInnerBlock;
      gradients_of_block<C>(g, unit / blocks, inner, length - inner < kInnerBlock ? length - inner : kInnerBlock);
    }
  }
}

}  // namespace

namespace CLK_ISA {

void distillation_gradients(const DistillationGradients& problem, int64_t begin, int64_t end) {
  problem.logits.f64 ? run_gradients<double>(problem, begin, end) : run_gradients<float>(problem, begin, end);
}

}  // namespace CLK_ISA
}  // namespace clk

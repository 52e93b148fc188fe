// Compiled once per instruction set, see common/isa.h.
#include "gating/cpu_kernels.h"

namespace clk {
namespace CLK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kPartial = 128;  // products summed before they are added to the total: keeps long sums accurate

inline float exponential(float v) { return __builtin_expf(v); }
inline double exponential(double v) { return __builtin_exp(v); }
inline float log_one_plus(float v) { return __builtin_log1pf(v); }
inline double log_one_plus(double v) { return __builtin_log1p(v); }

template <typename C>
inline C softplus(C v) {
  return v > C(20) ? v : log_one_plus(exponential(v));
}

// out[r][0..kPanel) = x_r · panel for kRows rows; the order of additions depends on neither the rows nor the threads.
template <typename C>
inline void multiply_panel(const C* const* rows, const C* panel, int64_t width, C* const* out) {
  typedef C Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
  constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(C));
  constexpr int vectors = static_cast<int>(kPanel) / lanes;
  Vector total[kRows][vectors] = {};
  for (int64_t start = 0; start < width; start += kPartial) {
    const int64_t stop = start + kPartial < width ? start + kPartial : width;
    Vector partial[kRows][vectors] = {};
    for (int64_t d = start; d < stop; ++d) {
      const Vector* weights = reinterpret_cast<const Vector*>(panel + d * kPanel);
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < vectors; ++v) partial[r][v] += rows[r][d] * weights[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vectors; ++v) total[r][v] += partial[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < vectors; ++v) reinterpret_cast<Vector*>(out[r])[v] = total[r][v];
  }
}

// The k largest by decreasing value, equal ones by increasing id, NaN above everything; then the softmax over them.
template <typename C>
void select(const C* logits, int64_t experts, int64_t k, uint8_t* taken, C* gates, int64_t* expert_ids) {
  for (int64_t e = 0; e < experts; ++e) taken[e] = 0;
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (taken[e]) continue;
      const bool larger = best < 0 || logits[e] > logits[best] || (logits[e] != logits[e] && logits[best] == logits[best]);
      if (larger) best = e;
    }
    taken[best] = 1;
    expert_ids[j] = best;
    gates[j] = logits[best];
  }
  const C largest = gates[0];
  C sum = 0;
  for (int64_t j = 0; j < k; ++j) {
    gates[j] = exponential(gates[j] - largest);
    sum += gates[j];
  }
  for (int64_t j = 0; j < k; ++j) gates[j] /= sum;
}

template <typename C>
void gate(const GatingProblem<C>& p, int64_t begin, int64_t end, C* logits, uint8_t* taken) {
  const int64_t panels = p.noise ? 2 * p.panels : p.panels;
  const int64_t row_length = 2 * p.panels * kPanel;
  for (int64_t first = begin; first < end; first += kRows) {
    const C* rows[kRows];
    C* out[kRows];
    for (int64_t r = 0; r < kRows; ++r) {  // a short last group repeats its last row, so that every row is summed alike
      const int64_t row = first + r < end ? first + r : end - 1;
      rows[r] = p.x + row * p.x_stride;
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t r = 0; r < kRows; ++r) out[r] = logits + r * row_length + panel * kPanel;
      multiply_panel(rows, p.packed + panel * p.width * kPanel, p.width, out);
    }
    for (int64_t row = first; row < first + kRows && row < end; ++row) {
      C* clean = logits + (row - first) * row_length;
      if (p.noise) {
        const C* spread = clean + p.panels * kPanel;
        for (int64_t e = 0; e < p.experts; ++e) clean[e] += p.noise[row * p.experts + e] * (softplus(spread[e]) + C(0.01));
      }
      select(clean, p.experts, p.k, taken, p.gates + row * p.k, p.expert_ids + row * p.k);
    }
  }
}

}  // namespace

void gate_rows(const GatingProblem<float>& p, int64_t begin, int64_t end, float* logits, uint8_t* taken) {
  gate(p, begin, end, logits, taken);
}
void gate_rows(const GatingProblem<double>& p, int64_t begin, int64_t end, double* logits, uint8_t* taken) {
  gate(p, begin, end, logits, taken);
}

}  // namespace CLK_ISA
}  // namespace clk

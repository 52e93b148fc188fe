// Declares the per-instruction-set functions; include with CLK_ISA defined once per namespace.
#pragma once

#include <cstdint>

namespace clk {

constexpr int64_t kPanel = 16;  // columns of packed weights that are multiplied together
constexpr int64_t kRows = 4;    // rows that share one pass over the packed weights

// One routing problem. Weights are packed in panels of kPanel columns, each (D, kPanel) in memory, experts padded with zeros:
// the gate's panels first, then those of the noise weight.
template <typename C>
struct GatingProblem {
  const C* x;  // [B, D], rows x_stride apart
  int64_t x_stride;
  const C* packed;  // [panels, D, kPanel]
  const C* noise;   // [B, E] or null
  int64_t width;    // D
  int64_t experts;  // E
  int64_t panels;   // of the gate alone
  int64_t k;
  C* gates;             // [B, k]
  int64_t* expert_ids;  // [B, k]
};

#define CLK_DECLARE(ISA)                                                                                              \
  namespace ISA {                                                                                                     \
  /* Rows [begin, end); logits is scratch of kRows * 2 * panels * kPanel, taken of experts bytes. */                  \
  void gate_rows(const GatingProblem<float>& p, int64_t begin, int64_t end, float* logits, uint8_t* taken);           \
  void gate_rows(const GatingProblem<double>& p, int64_t begin, int64_t end, double* logits, uint8_t* taken);         \
  }
CLK_DECLARE(baseline)
CLK_DECLARE(avx2)
CLK_DECLARE(avx512)
#undef CLK_DECLARE

}  // namespace clk

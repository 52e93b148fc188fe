// What forward and backward on the CPU have in common: checked views of the arguments and packed weights.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "moe_adapter/cpu_kernels.h"

namespace clk {
namespace moe {

struct Shape {
  int64_t batch, length, width, rank, experts, slots;
};

// One contiguous tensor of every expert, all of one shape: slices of a stack, or tensors of their own.
class PerExpert {
 public:
  explicit PerExpert(const Tensor& stack);                 // (E, …)
  explicit PerExpert(const std::vector<Tensor>& tensors);  // as many as experts, at least one

  int64_t experts() const { return static_cast<int64_t>(data_.size()); }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[static_cast<size_t>(i)]; }
  ScalarType scalar_type() const { return type_; }
  const void* const* data() const { return data_.data(); }
  // Whether all are of this type and (rows) or (rows, columns).
  bool is(ScalarType type, int64_t rows) const { return type_ == type && dim() == 1 && size(0) == rows; }
  bool is(ScalarType type, int64_t rows, int64_t columns) const {
    return type_ == type && dim() == 2 && size(0) == rows && size(1) == columns;
  }

 private:
  std::vector<Tensor> held_;
  std::vector<const void*> data_;
  std::vector<int64_t> sizes_;  // of one expert's
  ScalarType type_;
};

// Checks dimensions, sizes and types against each other, so that nothing is ever read outside a tensor.
Shape check_arguments(const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& down_weight,
                      const PerExpert& up_weight, const PerExpert& up_bias);
void check_like(const Tensor& tensor, const Tensor& expected, const char* name);

Element element_of(ScalarType type);
ScalarType compute_type(const Tensor& tensor);

// `tensor` with unit stride along its last dimension: itself or a copy.
Tensor unit_stride(const Tensor& tensor);
View view_of(const Tensor& tensor);

// Uninitialised (B, L, D) in the memory order of x: (L, B, D) in memory if x is, else (B, L, D).
Tensor empty_rows(const Tensor& x);

void fill(Problem& problem, const Shape& shape, const Tensor& x, const Tensor& expert_ids, const Tensor& gates, const PerExpert& up_bias,
          double scale, double dropout_p);

// How many rows each expert has to work on; ids out of range count for none.
struct Usage {
  std::vector<int64_t> rows;    // of every expert
  std::vector<int64_t> experts; // those with rows
  int64_t total = 0;

  Usage(const Shape& shape, const int64_t* expert_ids);
};

// The (K, n) or, transposed, (n, K) weights of the experts that somebody chose, for products of depth K with n columns: packed, or where
// they lie if they need neither transposing, nor converting, nor padding, and few rows would use what packing costs. In place, the lines of
// a panel are a row of the matrix apart and fall into a few sets of the cache.
class PackedWeights {
 public:
  // `bias` (n) of every expert, unless it is null, is one row more; only for what is packed, as transposed weights are.
  PackedWeights(const PerExpert& weight, const Usage& usage, bool transposed, const PerExpert* bias = nullptr);
  Weights weights() const { return {experts_.data(), step_, ld_}; }

 private:
  std::unique_ptr<char[]> memory_;
  std::vector<const void*> experts_;
  int64_t step_, ld_;
};

}  // namespace moe
}  // namespace clk

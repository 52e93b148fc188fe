// What forward and backward on the CPU have in common: checked views of the arguments, packed weights, and the cutting of the work
// into tiles.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
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

// The (sample, slot) pairs of every expert, in order: pairs[begin[e]] to pairs[begin[e + 1]]; ids out of range come last.
struct Pairs {
  std::vector<int64_t> begin, pairs;

  Pairs(const Shape& shape, const int64_t* expert_ids);
  int64_t count(int64_t expert) const {
    return begin[static_cast<size_t>(expert) + 1] - begin[static_cast<size_t>(expert)];
  }
};

// The (K, n) or, transposed, (n, K) weights of the experts that somebody chose, for products of depth K with n columns: packed, or where
// they lie if they need neither transposing, nor converting, nor padding.
class PackedWeights {
 public:
  PackedWeights(const PerExpert& weight, const Pairs& pairs, bool transposed);
  Weights weights() const { return {experts_.data(), step_, ld_}; }

 private:
  std::unique_ptr<char[]> memory_;
  std::vector<const void*> experts_;
  int64_t step_, ld_;
};

// Rows that choose the same experts in some slots, one run of slots after another, cut into tiles.
struct Grouping {
  std::vector<int64_t> order;       // linear token indices, group after group
  std::vector<Tile> entries;        // `first` is where the rows start in `order`
  std::vector<int64_t> passes = {0};  // first tile of every run of slots, and the end

  // Groups all rows by their experts in the slots from first_slot to end_slot.
  void append(const Shape& shape, const int64_t* expert_ids, int64_t first_slot, int64_t end_slot, int64_t rows);
  int64_t tiles() const { return static_cast<int64_t>(entries.size()); }
};

// Calls `run(tile, scratch)` for the tiles of some samples, in parallel; for tokens routed one by one, slot after slot.
class Tiles {
 public:
  Tiles(const Shape& shape, const int64_t* expert_ids);
  // Whether rows are visited once per slot, so that 16-bit results need `sums` between the visits.
  bool revisits() const { return passes_.size() > 2; }
  // Whether the tiles of some samples alone can be asked for.
  bool by_sample() const { return !gathered_; }

  template <typename Run>
  void for_each(const Problem& problem, int64_t first_sample, int64_t end_sample, Run run) const {
    const int64_t bytes = CLK_CALL(tile_scratch, problem);
    for (size_t pass = 0; pass + 1 < passes_.size(); ++pass) {
      const int64_t first = gathered_ ? passes_[pass] : first_sample * tiles_per_sample_;
      const int64_t last = gathered_ ? passes_[pass + 1] : end_sample * tiles_per_sample_;
      torch::stable::parallel_for(first, last, grain_, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(bytes) + 64]);
        char* scratch = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
        for (int64_t i = begin; i < end; ++i) run(tile(i), scratch);
      });
    }
  }

 private:
  Tile tile(int64_t i) const;

  Shape shape_;
  bool gathered_;
  int64_t tiles_per_sample_ = 0, grain_ = 1;
  Grouping grouping_;            // of gathered rows
  std::vector<int64_t> passes_;  // first tile of every pass, and the end
};

}  // namespace moe
}  // namespace clk

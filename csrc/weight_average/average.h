#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "weight_average/counters.h"

namespace clk {

inline int64_t counters_of(int64_t numel) { return (numel + kElementsPerCounter - 1) / kElementsPerCounter; }

// Which row owns an address: a table of a fixed size that at most half fills.
class Owners {
 public:
  explicit Owners(size_t rows) {
    size_t slots = 2;
    while (slots < 2 * rows) slots *= 2;
    entries_.resize(slots);
  }
  // The row that came with this address first; without `add`, `row` itself where none did.
  size_t of(const void* address, size_t row, bool add) {
    const size_t mask = entries_.size() - 1;
    for (size_t i = (reinterpret_cast<uintptr_t>(address) / 64 * 0x9E3779B97F4A7C15u) >> 32 & mask;; i = (i + 1) & mask) {
      Entry& entry = entries_[i];
      if (entry.address == address) return entry.row;
      if (entry.address != nullptr) continue;
      if (add) entry = {address, row};
      return row;
    }
  }

 private:
  struct Entry {
    const void* address = nullptr;
    size_t row = 0;
  };
  std::vector<Entry> entries_;
};

// Everything that the public function promises to refuse, before any work; cl_kernels/weight_average/arguments.py finds the words.
inline void check_tensors(const std::vector<Tensor>& averages, const std::vector<Tensor>& values, const std::vector<Tensor>& others) {
  STD_TORCH_CHECK(averages.size() == values.size(), "average_: expected as many values as averages");
  STD_TORCH_CHECK(others.empty() || averages.size() == others.size(), "average_: expected as many others as averages, or none");
  if (averages.empty()) return;
  Owners owners(averages.size());
  const auto device = averages[0].device();
  for (size_t i = 0; i < averages.size(); ++i) {
    const Tensor& average = averages[i];
    STD_TORCH_CHECK(average.device() == device, "average_: expected all tensors on one device");
    STD_TORCH_CHECK(average.is_contiguous(), "average_: expected contiguous tensors");
    const auto sizes = average.sizes();
    for (const std::vector<Tensor>* list : {&values, &others}) {
      if (list->empty()) continue;
      const Tensor& tensor = (*list)[i];
      const auto its = tensor.sizes();
      STD_TORCH_CHECK(sizes.size() == its.size() && std::equal(sizes.begin(), sizes.end(), its.begin()),
                      "average_: expected the same number of elements and the same shape in every tensor of a row");
      STD_TORCH_CHECK(tensor.device() == device, "average_: expected all tensors on one device");
      STD_TORCH_CHECK(tensor.is_contiguous(), "average_: expected contiguous tensors");
    }
    const void* address = average.data_ptr();
    STD_TORCH_CHECK(average.numel() == 0 || owners.of(address, i, true) == i, "average_: expected every average once");
  }
  for (const std::vector<Tensor>* list : {&values, &others}) {
    for (size_t i = 0; i < list->size(); ++i) {
      const Tensor& tensor = (*list)[i];
      STD_TORCH_CHECK(tensor.numel() == 0 || owners.of(tensor.data_ptr(), i, false) == i,
                      "average_: expected no value that is another row's average");
    }
  }
}

// averages[i] <- averages[i] + weight * (values[i] - averages[i]) + other_weight * (others[i] - averages[i]), in place, fp32 arithmetic
// (fp64 for fp64 averages); without others the first two terms. With a seed, 16-bit averages are rounded stochastically.
void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight, std::vector<Tensor> others, double other_weight,
                 std::optional<int64_t> seed);
void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> values, double weight, std::vector<Tensor> others, double other_weight,
                  std::optional<int64_t> seed);

}  // namespace clk

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "weight_average/counters.h"

namespace clk {

inline int64_t counters_of(int64_t numel) { return (numel + kElementsPerCounter - 1) / kElementsPerCounter; }

// For those who call the operator itself: what would otherwise read or write out of bounds.
inline void check_tensors(const std::vector<Tensor>& averages, const std::vector<Tensor>& values, const std::vector<Tensor>& others) {
  STD_TORCH_CHECK(averages.size() == values.size(), "average_: expected as many values as averages");
  STD_TORCH_CHECK(others.empty() || averages.size() == others.size(), "average_: expected as many others as averages, or none");
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].device() == averages[0].device(), "average_: expected all tensors on one device");
    STD_TORCH_CHECK(averages[i].is_contiguous(), "average_: expected contiguous tensors");
    for (const std::vector<Tensor>* list : {&values, &others}) {
      if (list->empty()) continue;
      const Tensor& tensor = (*list)[i];
      STD_TORCH_CHECK(averages[i].numel() == tensor.numel(), "average_: expected the same number of elements in every tensor of a row");
      STD_TORCH_CHECK(tensor.device() == averages[0].device(), "average_: expected all tensors on one device");
      STD_TORCH_CHECK(tensor.is_contiguous(), "average_: expected contiguous tensors");
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

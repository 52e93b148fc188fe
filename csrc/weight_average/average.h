#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/tensor.h"

namespace clk {

// For those who call the operator itself: what would otherwise read or write out of bounds.
inline void check_pairs(const std::vector<Tensor>& averages, const std::vector<Tensor>& values) {
  STD_TORCH_CHECK(averages.size() == values.size(), "average_: expected as many values as averages");
  for (size_t i = 0; i < averages.size(); ++i) {
    STD_TORCH_CHECK(averages[i].numel() == values[i].numel(), "average_: expected the same number of elements in both tensors");
    STD_TORCH_CHECK(averages[i].device() == values[i].device() && averages[i].device() == averages[0].device(),
                    "average_: expected all tensors on one device");
    STD_TORCH_CHECK(averages[i].is_contiguous() && values[i].is_contiguous(), "average_: expected contiguous tensors");
  }
}

// averages[i] <- averages[i] + weight * (values[i] - averages[i]), in place, fp32 arithmetic (fp64 for fp64 averages).
void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight);
void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> values, double weight);

}  // namespace clk

#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor.h"

namespace clk {

// averages[i] <- averages[i] + weight * (values[i] - averages[i]), in place, fp32 arithmetic (fp64 for fp64 averages).
void average_cpu(std::vector<Tensor> averages, std::vector<Tensor> values, double weight);
void average_cuda(std::vector<Tensor> averages, std::vector<Tensor> values, double weight);

}  // namespace clk

#pragma once

#include <vector>

#include "common/tensor.h"

namespace clk {

// Σ ‖tensors[i] − references[i]‖² as a 0-d tensor, over lists of contiguous float32 or float64 tensors of pairwise equal shape.
Tensor squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references);

// grad · 2 (tensors[i] − references[i]).
std::vector<Tensor> squared_distance_backward_cpu(Tensor grad, std::vector<Tensor> tensors, std::vector<Tensor> references);

}  // namespace clk

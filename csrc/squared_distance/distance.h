#pragma once

#include <vector>

#include "common/tensor.h"

namespace clk {

// Everything here takes lists of contiguous float32 or float64 tensors of pairwise equal shape and one dtype.

// Σ ‖tensors[i] − references[i]‖² as a 0-d tensor.
Tensor squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references);

// Σ weights[i] (tensors[i] − references[i])², summed over all elements, as a 0-d tensor.
Tensor weighted_squared_distance_cpu(std::vector<Tensor> tensors, std::vector<Tensor> references, std::vector<Tensor> weights);

// grad · 2 (tensors[i] − references[i]).
std::vector<Tensor> squared_distance_backward_cpu(Tensor grad, std::vector<Tensor> tensors, std::vector<Tensor> references);

// gradients[i] += factor · weights[i] (tensors[i] − references[i]); without weights they are 1.
void add_difference_cpu(std::vector<Tensor> gradients, std::vector<Tensor> tensors, std::vector<Tensor> references,
                        std::vector<Tensor> weights, double factor);

}  // namespace clk

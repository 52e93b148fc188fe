#pragma once

#include <tuple>

#include "common/tensor.h"

namespace clk {

// Schemas and shapes: cl_kernels/schemas.py.
std::tuple<Tensor, Tensor> distillation_cpu(Tensor teacher, Tensor student, double temperature);
std::tuple<Tensor, Tensor> distillation_backward_cpu(Tensor grad, Tensor teacher, Tensor student, Tensor stats, double temperature,
                                                     bool need_teacher, bool need_student);

}  // namespace clk

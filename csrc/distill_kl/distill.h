#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "distill_kl/cpu_kernels.h"

namespace clk {

// Schemas and shapes: cl_kernels/schemas.py.
std::tuple<Tensor, Tensor> distill_kl_cpu(Tensor student, Tensor teacher, double temperature, bool kl);
Tensor distill_kl_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor stats, double temperature);
void distill_kl_overwrite_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor stats, double temperature);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feature_distill_kl_cpu(
    Tensor student, Tensor teacher, Tensor anchors, std::optional<Tensor> teacher_anchors, std::optional<Tensor> weight,
    std::optional<Tensor> logit_scale, double factor, double temperature, double rows, double columns, bool kl, bool mask_diagonal,
    bool need_student, bool need_anchors);
std::tuple<Tensor, Tensor, Tensor> feature_distill_kl_backward_cpu(
    Tensor grad, Tensor student, Tensor teacher, Tensor anchors, std::optional<Tensor> teacher_anchors,
    std::optional<Tensor> weight, std::optional<Tensor> logit_scale, Tensor row_stats, Tensor column_stats, double factor,
    double temperature, double rows, double columns, bool mask_diagonal, bool need_student, bool need_anchors, bool need_scale);

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "distillation: expected float32, float64, bfloat16 or float16");
  }
}

inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace clk

// Helpers around torch::stable::Tensor that every operation needs. Not for per-instruction-set files.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common/scalar.h"

namespace clk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls BODY with `T` bound to the storage type of SCALAR_TYPE.
#define CLK_DISPATCH_FLOATING(SCALAR_TYPE, T, NAME, ...)                                   \
  [&] {                                                                                    \
    switch (SCALAR_TYPE) {                                                                 \
      case ::clk::ScalarType::Float: { using T = float; return __VA_ARGS__(); }            \
      case ::clk::ScalarType::Double: { using T = double; return __VA_ARGS__(); }          \
      case ::clk::ScalarType::BFloat16: { using T = ::clk::BFloat16; return __VA_ARGS__(); } \
      case ::clk::ScalarType::Half: { using T = ::clk::Half; return __VA_ARGS__(); }       \
      default: STD_TORCH_CHECK(false, NAME, ": expected float32, float64, bfloat16 or float16"); \
    }                                                                                      \
  }()

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace clk

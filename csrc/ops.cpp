// Every compiled operation, in one place. Schemas live in cl_kernels/schemas.py, because they must exist where nothing was compiled;
// this file registers the implementations of this library against them.
#include "distill_kl/distill.h"
#include "distillation/distillation.h"
#include "gating/gating.h"
#include "moe_adapter/adapter.h"
#include "moe_adapter/routed.h"
#include "squared_distance/distance.h"
#include "weight_average/average.h"

STABLE_TORCH_LIBRARY_IMPL(cl_kernels, CPU, m) {
  m.impl("average_", TORCH_BOX(&clk::average_cpu));
  m.impl("top_k_gating", TORCH_BOX(&clk::top_k_gating_cpu));
  m.impl("moe_adapter", TORCH_BOX(&clk::moe_adapter_cpu));
  m.impl("moe_adapter_backward", TORCH_BOX(&clk::moe_adapter_backward_cpu));
  m.impl("routed_block", TORCH_BOX(&clk::routed_block_cpu));
  m.impl("routed_block_backward", TORCH_BOX(&clk::routed_block_backward_cpu));
  m.impl("squared_distance", TORCH_BOX(&clk::squared_distance_cpu));
  m.impl("squared_distance_backward", TORCH_BOX(&clk::squared_distance_backward_cpu));
  m.impl("weighted_squared_distance", TORCH_BOX(&clk::weighted_squared_distance_cpu));
  m.impl("add_difference_", TORCH_BOX(&clk::add_difference_cpu));
  m.impl("distill_kl", TORCH_BOX(&clk::distill_kl_cpu));
  m.impl("distill_kl_backward", TORCH_BOX(&clk::distill_kl_backward_cpu));
  m.impl("distillation", TORCH_BOX(&clk::distillation_cpu));
  m.impl("distillation_backward", TORCH_BOX(&clk::distillation_backward_cpu));
  m.impl("distill_kl_overwriting", TORCH_BOX(&clk::distill_kl_cpu));
  m.impl("distill_kl_backward_", TORCH_BOX(&clk::distill_kl_overwrite_cpu));
  m.impl("feature_distill_kl", TORCH_BOX(&clk::feature_distill_kl_cpu));
  m.impl("feature_distill_kl_backward", TORCH_BOX(&clk::feature_distill_kl_backward_cpu));
}

#if defined(CLK_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(cl_kernels, CUDA, m) {
  m.impl("average_", TORCH_BOX(&clk::average_cuda));
}
#endif

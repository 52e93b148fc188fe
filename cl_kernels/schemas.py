"""The schema of every operation, in one place.

A schema is registered twice: in the namespace ``cl_kernels`` for the compiled library (CPU and CUDA keys, see csrc/ops.cpp) and in
``cl_kernels_triton`` for the Triton kernels, so that both can be present and chosen call by call. Outputs never alias inputs.
"""

from __future__ import annotations

SCHEMAS = {
    # x (B, L, D), expert_ids (B, k) int64, gates (B, k) fp32/fp64, seed () int64 on the CPU -> out (B, L, D), hidden (B, k, L, R):
    # the bottleneck activation after ReLU and dropout, which is all that the backward pass needs.
    "moe_adapter": (
        "(Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, "
        "Tensor? residual, Tensor? seed, float scale, float dropout_p) -> (Tensor out, Tensor hidden)"
    ),
    # Gradients that are not needed come back with zero elements.
    "moe_adapter_backward": (
        "(Tensor grad, Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor up_weight, Tensor up_bias, "
        "Tensor hidden, float scale, float dropout_p, bool need_x, bool need_gates, bool need_experts) -> "
        "(Tensor grad_x, Tensor grad_gates, Tensor grad_down_weight, Tensor grad_down_bias, "
        "Tensor grad_up_weight, Tensor grad_up_bias)"
    ),
    "average_": "(Tensor(a!)[] averages, Tensor[] values, float weight) -> ()",
}

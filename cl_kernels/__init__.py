"""Fused kernels for continual learning of vision-language models.

Three operations, each with a plain PyTorch reference, a compiled CPU path and Triton kernels: top-k mixture-of-adapters
dispatch, distillation between similarity matrices, and in-place weight averaging. Needs torch alone; every call works without
Triton, without the compiled library and without a GPU, and :func:`backends` tells what runs and why.
"""

from cl_kernels.dispatch import backends, use_backend
from cl_kernels.distill_kl import distill_kl, feature_distill_kl
from cl_kernels.gating import top_k_gating
from cl_kernels.moe_adapter import moe_adapter
from cl_kernels.weight_average import average_, blend_

__all__ = [
    "average_",
    "backends",
    "blend_",
    "distill_kl",
    "feature_distill_kl",
    "moe_adapter",
    "top_k_gating",
    "use_backend",
]
__version__ = "0.1.0"

"""mammoth (github.com/aimagelab/mammoth): its port of MoE-Adapters."""

from __future__ import annotations

from torch import nn

from cl_kernels.drop_in.moe_adapters4cl import patch_model
from cl_kernels.drop_in.patch import Patch


def patch_mammoth_moe_adapters(model: nn.Module) -> Patch:
    """Run the adapters of mammoth's ``moe-adapters`` through one kernel per block, in training and evaluation.

    What :func:`cl_kernels.drop_in.patch_moe_adapters4cl` says holds here too. mammoth draws noise for the gates in evaluation, and
    so does the patched model.

    Args:
        model: mammoth's continual model (``MoEAdapters``), its ``net``, or the CLIP inside.

    Returns:
        The patch: ``replaced`` names the blocks.

    Raises:
        ValueError: there is no such block, or none can be replaced.
        TypeError: ``model`` is not a module.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), section 3.2; mammoth's ``models/moe_adapters_utils``.
    """
    return patch_model(model, "patch_mammoth_moe_adapters")

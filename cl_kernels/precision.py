"""How many digits products of float32 numbers keep on a GPU."""

from __future__ import annotations

import torch


def float32_products(device: torch.device) -> str:
    """``"tf32"`` where the user lets CUDA's matrix products have it, else ``"ieee"``: ``input_precision`` of ``tl.dot``.

    Read where all of torch's switches meet: the older ones (``set_float32_matmul_precision``, ``allow_tf32``) are refused once
    somebody has used the newer ``fp32_precision``, and set it themselves. AMD's processors of the gfx9 family get no TF32.

    Args:
        device: of the factors.
    """
    allowed = device.type == "cuda" and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

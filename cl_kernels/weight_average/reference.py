"""Weight averaging in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def average_(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """``a ← a + weight · (v − a)``, computed in fp64 for fp64 averages and in fp32 otherwise."""
    for average, value in zip(averages, values, strict=True):
        compute = torch.float64 if average.dtype == torch.float64 else torch.float32
        start = average.to(compute)  # the average itself, unless it is stored in 16 bits
        result = torch.add(start, value.to(compute) - start, alpha=weight)
        average.copy_(result)

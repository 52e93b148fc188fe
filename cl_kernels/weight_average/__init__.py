"""In-place averaging of model weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.weight_average import autograd, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.no_grad()
def average_(
    averages: Iterable[Tensor], values: Iterable[Tensor], weight: float, *, backend: str | None = None
) -> None:
    """``a ← a + weight · (v − a)`` for every pair, in place and allocating nothing tensor-sized.

    ``weight = 1/(n+1)`` after ``n`` earlier snapshots is a running mean; ``1 − decay`` an exponential moving average; an
    interpolation weight merges two models (WiSE-FT). Arithmetic is fp32 for any pair of dtypes (fp64 where ``averages`` is fp64).
    No gradient flows.

    Args:
        averages: tensors that are updated; float32, float64, bfloat16 or float16.
        values: tensors of the same shapes and device, in the same order; any of these dtypes.
        weight: share of ``values`` in the result.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Raises:
        ValueError: numbers of tensors, shapes or devices differ, or the backend cannot run them.
        TypeError: an entry is not a tensor of one of those dtypes.

    Source: ZSCL (Zheng et al., 2023), section 3.3 (weight ensemble); Izmailov et al., 2018.
    """
    averages, values = list(averages), list(values)
    _check(averages, values)
    if not averages:
        return
    chosen = dispatch.choose("average_", averages[0].device, backend)
    if chosen == "reference" or not all(t.is_contiguous() for t in (*averages, *values)):
        reference.average_(averages, values, weight)
        return
    autograd.operator(chosen)(averages, values, float(weight))
    torch.autograd.graph.increment_version(averages)


def _check(averages: list[Tensor], values: list[Tensor]) -> None:
    if len(averages) != len(values):
        raise ValueError(
            f"averages and values: {len(averages)} tensors against {len(values)}, expected as many of each"
        )
    for i, (a, v) in enumerate(zip(averages, values, strict=True)):
        for name, tensor in (("averages", a), ("values", v)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
                given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}[{i}]: got {given}, expected a float32, float64, bfloat16 or float16 tensor")
        if a.shape != v.shape:
            raise ValueError(
                f"averages[{i}] is {tuple(a.shape)}, values[{i}] is {tuple(v.shape)}: expected the same shape"
            )
        if a.device != v.device or a.device != averages[0].device:
            raise ValueError(f"averages[{i}] is on {a.device}, values[{i}] on {v.device}: expected one device for all")

"""In-place averaging of model weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.weight_average import autograd, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_RESOLUTION = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_warned: set[torch.dtype] = set()


@torch.no_grad()
def average_(
    averages: Iterable[Tensor], values: Iterable[Tensor], weight: float, *, backend: str | None = None
) -> None:
    """``a ← a + weight · (v − a)`` for every pair, in place and allocating nothing tensor-sized.

    ``weight = 1/(n+1)`` after ``n`` earlier snapshots is a running mean; ``1 − decay`` an exponential moving average; an
    interpolation weight merges two models (WiSE-FT). Arithmetic is fp32 for any pair of dtypes (fp64 where ``averages`` is fp64).
    No gradient flows. Pairs whose elements lie in different order in memory go through PyTorch one by one, with a temporary.

    A bf16 or fp16 average loses every change smaller than half of its last digit: with a weight below 2⁻⁸ (2⁻¹¹) it can stand still
    for ever, which is worth a warning. Keep such an average in fp32; the values may stay in 16 bits.

    Args:
        averages: tensors that are updated, each of them once; float32, float64, bfloat16 or float16, of any shape and layout.
        values: tensors of the same shapes and device, in the same order; any of these dtypes.
        weight: share of ``values`` in the result.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Raises:
        ValueError: numbers of tensors, shapes or devices differ, a tensor of ``averages`` comes twice, is expanded, or is another
            pair's value, or the backend cannot run them.
        TypeError: an entry is not a tensor of one of those dtypes, or weight not a number.

    Source: ZSCL (Zheng et al., 2023), section 3.3 (weight ensemble); Izmailov et al., 2018.
    """
    averages, values = list(averages), list(values)
    _check(averages, values, weight)
    if not averages:
        return
    chosen = dispatch.choose("average_", averages[0].device, backend)
    if chosen == "reference":
        reference.average_(averages, values, weight)
        return
    flat: tuple[list[Tensor], list[Tensor]] = ([], [])
    other: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, v in zip(averages, values, strict=True):
        if a.is_contiguous() and v.is_contiguous():
            pair, group = (a, v), flat
        elif a.stride() == v.stride() and _dense(a):
            length = (a.numel(),)
            pair, group = (a.as_strided(length, (1,)), v.as_strided(length, (1,))), flat
        else:
            pair, group = (a, v), other
        group[0].append(pair[0])
        group[1].append(pair[1])
    if flat[0]:
        autograd.operator(chosen)(*flat, float(weight))
        torch.autograd.graph.increment_version(flat[0])
    reference.average_(*other, weight)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or repetition, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a number")
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
        if any(stride == 0 and size > 1 for stride, size in zip(a.stride(), a.shape, strict=True)):
            raise ValueError(
                f"averages[{i}]: got an expanded tensor of strides {a.stride()}, expected memory of its own"
            )
    if not torch.compiler.is_compiling():  # addresses exist at run time only
        _check_aliases(averages, values)
        _warn_of_stalling(averages, weight)


def _check_aliases(averages: list[Tensor], values: list[Tensor]) -> None:
    """Two pairs that share memory would depend on which of them comes first."""
    owner: dict[int, int] = {}
    for i, a in enumerate(averages):
        if a.numel() and owner.setdefault(_address(a), i) != i:
            raise ValueError(f"averages[{i}] is the same memory as averages[{owner[_address(a)]}]: expected each once")
    for i, v in enumerate(values):
        if v.numel() and owner.get(_address(v), i) != i:
            raise ValueError(
                f"values[{i}] is the same memory as averages[{owner[_address(v)]}], which changes in this call"
            )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.device.type != "meta" else id(tensor)


def _warn_of_stalling(averages: list[Tensor], weight: float) -> None:
    if not 0 < abs(weight) < _RESOLUTION[torch.bfloat16]:
        return
    for dtype in {a.dtype for a in averages} - _warned:
        if abs(weight) < _RESOLUTION.get(dtype, 0.0):
            _warned.add(dtype)
            name = str(dtype).removeprefix("torch.")
            warnings.warn(
                f"average_: with weight {weight:.3g} a {name} average can stand still, because changes "
                f"below {_RESOLUTION[dtype] / 2:.2g} of a weight are rounded away; keep the average in float32",
                RuntimeWarning,
                stacklevel=5,
            )

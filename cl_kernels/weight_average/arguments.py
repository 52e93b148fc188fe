"""What weight averaging accepts: the checks of its arguments and the warning about averages that stand still."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

Lists = tuple[list[Tensor], ...]
"""The averages, the values and, for three-way averages, the other values."""

NAMES = ("averages", "values", "others")
ROUNDINGS = ("nearest", "stochastic")
RESOLUTION = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_warned: set[torch.dtype] = set()


def check_numbers(rounding: str, seed: int | None, **weights: float) -> None:
    """Raise TypeError or ValueError unless weights are numbers and the rounding exists and may have that seed."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{name}: got {type(weight).__name__}, expected a number")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: got {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an integer or None")
    if seed is not None and rounding != "stochastic":
        raise ValueError(f"seed: got {seed} with rounding={rounding!r}, expected one with 'stochastic' only")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - 1")


def check_lists(lists: Lists) -> None:
    """Raise TypeError or ValueError unless the lists have equal lengths, shapes and devices, and dtypes that can be averaged."""
    averages = lists[0]
    for name, tensors in zip(NAMES[1:], lists[1:], strict=False):
        if len(tensors) != len(averages):
            raise ValueError(
                f"averages and {name}: {len(averages)} tensors against {len(tensors)}, expected as many of each"
            )
    for i, row in enumerate(zip(*lists, strict=True)):
        for name, tensor in zip(NAMES, row, strict=False):
            if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
                given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}[{i}]: got {given}, expected a float32, float64, bfloat16 or float16 tensor")
            if tensor.layout != torch.strided:
                raise TypeError(f"{name}[{i}]: got a {tensor.layout} tensor, expected a dense one")
        a = row[0]
        for name, tensor in zip(NAMES[1:], row[1:], strict=False):
            if a.shape != tensor.shape:
                raise ValueError(
                    f"averages[{i}] is {tuple(a.shape)}, {name}[{i}] is {tuple(tensor.shape)}: expected the same shape"
                )
            if a.device != tensor.device or a.device != averages[0].device:
                raise ValueError(
                    f"averages[{i}] is on {a.device}, {name}[{i}] on {tensor.device}: expected one device for all"
                )
        if any(stride == 0 and size > 1 for stride, size in zip(a.stride(), a.shape, strict=True)):
            raise ValueError(
                f"averages[{i}]: got an expanded tensor of strides {a.stride()}, expected memory of its own"
            )


def check_aliases(lists: Lists) -> None:
    """Raise ValueError where rows share memory, because the result would depend on which of them comes first."""
    owner: dict[int, int] = {}
    for i, a in enumerate(lists[0]):
        if a.numel() and owner.setdefault(_address(a), i) != i:
            raise ValueError(f"averages[{i}] is the same memory as averages[{owner[_address(a)]}]: expected each once")
    for name, tensors in zip(NAMES[1:], lists[1:], strict=False):
        for i, v in enumerate(tensors):
            if v.numel() and owner.get(_address(v), i) != i:
                raise ValueError(
                    f"{name}[{i}] is the same memory as averages[{owner[_address(v)]}], which changes in this call"
                )


def _address(tensor: Tensor) -> int:
    without = tensor.untyped_storage().device.type == "meta"  # of meta tensors and of torch's fake ones
    return id(tensor) if without else tensor.data_ptr()


def warn_of_stalling(dtypes: frozenset[torch.dtype], weight: float) -> None:
    """Warn once for each 16-bit dtype of the averages whose rounding can swallow every step of this weight."""
    for dtype in dtypes - _warned:
        if 0 < abs(weight) < RESOLUTION.get(dtype, 0.0):
            _warned.add(dtype)
            name = str(dtype).removeprefix("torch.")
            warnings.warn(
                f"average_: with weight {weight:.3g} a {name} average can stand still, because changes "
                f"below {RESOLUTION[dtype] / 2:.2g} of a weight are rounded away; keep the average in float32 or pass "
                "rounding='stochastic'",
                RuntimeWarning,
                stacklevel=4,
            )

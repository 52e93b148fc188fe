"""Random tensors with values on a coarse grid, in every memory layout, and how close two of them must be."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("CLK_FUZZ_DEVICE", "cpu")
"""Where the implementation under test runs."""

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""float32 twice as often: it is what most people run."""

PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, relative to the size of the result: some hundred rounding errors of float32, eight of the others."""


class Draw:
    """One case: everything random in it follows from operation and number and the dtypes to choose from."""

    def __init__(self, operation: str, number: int, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
        self.dtypes = dtypes
        self.random = random.Random(f"{operation} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def dtype(self) -> torch.dtype:
        """One of the case's dtypes."""
        return self.choice(self.dtypes)

    def size(self, largest: int, smallest: int = 0) -> int:
        """Mostly small, sometimes up to ``largest``, now and then a power of two or one beside it."""
        kind = self.random.random()
        if kind < 0.6:
            return self.random.randint(smallest, min(largest, smallest + 6))
        if kind < 0.8:
            near = 2 ** self.random.randint(0, max(int(math.log2(max(largest, 1))), 0)) + self.random.randint(-1, 1)
            return min(max(near, smallest), largest)
        return self.random.randint(smallest, largest)

    def grid(self, shape: Sequence[int], dtype: torch.dtype, step: float = 0.25, most: int = 6) -> Tensor:
        """Multiples of ``step`` up to ``most`` steps: exact in every dtype, so that a ReLU falls on the same side for all."""
        values = torch.randint(-most, most + 1, tuple(shape), generator=self.generator)
        return self.layout((values * step).to(dtype))

    def normal(self, shape: Sequence[int], dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        """Normal values, rounded to the dtype."""
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64) * spread
        return self.layout(values.to(dtype))

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [low, high)."""
        return self.layout(torch.randint(low, max(high, low + 1), tuple(shape), generator=self.generator).to(dtype))

    def layout(self, tensor: Tensor) -> Tensor:
        """The same values as a dense tensor, a permuted or strided view, one with an offset, or an expanded one."""
        kind = self.random.randrange(7)
        if tensor.dim() == 0 or kind < 3:
            return tensor
        if kind == 3:
            order = self.random.sample(range(tensor.dim()), tensor.dim())
            inverse = [order.index(d) for d in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(inverse)
        dim = self.random.randrange(tensor.dim())
        if kind == 4 and tensor.shape[dim]:  # other values, but the same shape: one slice repeated
            return tensor.narrow(dim, 0, 1).expand(tensor.shape)
        step, offset = self.random.randint(1, 3), self.random.randint(0, 2)
        larger = list(tensor.shape)
        larger[dim] = larger[dim] * step + offset
        around = tensor.new_full(larger, 7 if not tensor.is_floating_point() else float("nan"))
        view = around.narrow(dim, offset, tensor.shape[dim] * step).unflatten(dim, (tensor.shape[dim], step)).select(
            dim + 1, 0
        ) if tensor.numel() else tensor  # fmt: skip
        return view.copy_(tensor) if tensor.numel() else tensor

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def choice(self, values: Sequence[Any]) -> Any:
        """One of the values."""
        return self.random.choice(values)


def assert_close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """``found`` is finite where ``expected`` is, and differs by at most the dtype's precision of ``size`` + its largest entry."""
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not expected.numel():
        return
    most = torch.finfo(found.dtype).max  # beyond it, infinity is right
    found, expected = found.detach().double().clamp(-most, most), expected.detach().double().clamp(-most, most)
    assert torch.equal(found.isnan(), expected.isnan()), f"{name}: NaN in other places"
    error = (found - expected).nan_to_num(0.0).abs().max().item()
    limit = PRECISION[dtype] * (size + expected.nan_to_num(0.0).abs().max().item())
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"

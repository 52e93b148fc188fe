"""Weight averaging in plain PyTorch: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_kernels import philox

ELEMENTS_PER_COUNTER = 8


def average_(
    averages: list[Tensor],
    values: list[Tensor],
    weight: float,
    others: Sequence[Tensor] = (),
    other_weight: float = 0.0,
    seed: int | None = None,
) -> None:
    """``a ← a + weight · (v − a) + other_weight · (o − a)``, computed in fp64 for fp64 averages and in fp32 otherwise.

    With a seed, 16-bit averages are rounded stochastically.
    """
    counter = 0
    for i, (average, value) in enumerate(zip(averages, values, strict=True)):
        compute = torch.float64 if average.dtype == torch.float64 else torch.float32
        start = average.to(compute)  # the average itself, unless it is stored in 16 bits
        result = torch.add(start, value.to(compute) - start, alpha=weight)
        if others:
            result.add_(others[i].to(compute) - start, alpha=other_weight)
        if seed is not None and average.dtype in _ROUND:
            result = _ROUND[average.dtype](result, _random_bits(seed, counter, average))
        average.copy_(result)
        counter += (average.numel() + ELEMENTS_PER_COUNTER - 1) // ELEMENTS_PER_COUNTER


def _random_bits(seed: int, counter: int, like: Tensor) -> Tensor:
    """16 bits for every element of ``like``, as int32: the halves of the words of counter, counter + 1, …, low half first."""
    counters = (like.numel() + ELEMENTS_PER_COUNTER - 1) // ELEMENTS_PER_COUNTER
    words = philox.words(torch.tensor(seed), torch.arange(counter, counter + counters, device=like.device))
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten()
    return halves[: like.numel()].to(torch.int32).view(like.shape)


def _to_bfloat16(exact: Tensor, random: Tensor) -> Tensor:
    """Adding below the last digit that is kept and cutting off carries with the right probability."""
    rounded = ((exact.view(torch.int32) + random) & ~0xFFFF).view(torch.float32)
    return torch.where(exact.isnan(), exact, rounded)


def _to_float16(exact: Tensor, random: Tensor) -> Tensor:
    """As for bfloat16, with 13 digits to cut; below 2⁻¹⁴ the digits of a half are multiples of 2⁻²⁴."""
    magnitude = exact.abs()
    normal = ((magnitude.view(torch.int32) + (random >> 3)) & ~0x1FFF).view(torch.float32)
    subnormal = (magnitude * 2.0**24 + random * 2.0**-16).trunc() * 2.0**-24
    rounded = torch.where(magnitude < 2.0**-14, subnormal, normal).copysign(exact)
    return torch.where(exact.isnan(), exact, rounded)


_ROUND = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}

"""In-place averaging of model weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cl_kernels import dispatch, philox
from cl_kernels.weight_average import autograd, plan, reference
from cl_kernels.weight_average.arguments import RESOLUTION, check_numbers, warn_of_stalling


def average_(
    averages: Iterable[Tensor],
    values: Iterable[Tensor],
    weight: float,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """``a ← a + weight · (v − a)`` for every pair, in place and allocating nothing tensor-sized.

    ``weight = 1/(n+1)`` after ``n`` earlier snapshots is a running mean; ``1 − decay`` an exponential moving average; an
    interpolation weight merges two models (WiSE-FT). Arithmetic is fp32 for any pair of dtypes (fp64 where ``averages`` is fp64).
    No gradient flows. Pairs whose elements lie in different order in memory are copied first, one temporary each.

    A bf16 or fp16 average that is rounded to the nearest number loses every change smaller than half of its last digit: with a
    weight below 2⁻⁸ (2⁻¹¹) it can stand still for ever, which is worth a warning. Keep such an average in fp32 (the values may
    stay in 16 bits), or round stochastically: up with the probability of the share of the way, so that the expected value is
    exact. The bits come from Philox under ``seed``, the position in the list and in the tensor: every backend draws the same.

    Args:
        averages: tensors that are updated, each of them once; float32, float64, bfloat16 or float16, of any shape and layout.
        values: tensors of the same shapes and device, in the same order; any of these dtypes.
        weight: share of ``values`` in the result.
        rounding: of 16-bit averages, ``"nearest"`` or ``"stochastic"``; others are always rounded to the nearest.
        seed: of stochastic rounding, another one for each call; from torch's default generator when None.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Raises:
        ValueError: numbers of tensors, shapes or devices differ, a tensor of ``averages`` comes twice, is expanded, or is another
            pair's value, there is no such rounding, or the backend cannot run them.
        TypeError: an entry is not a tensor of one of those dtypes, or weight not a number.

    Source: ZSCL (Zheng et al., 2023), section 3.3 (weight ensemble); Izmailov et al., 2018.
    """
    check_numbers(rounding, seed, weight=weight)
    _run((list(averages), list(values)), float(weight), 0.0, rounding, seed, backend)


def blend_(
    averages: Iterable[Tensor],
    values: Iterable[Tensor],
    others: Iterable[Tensor],
    weight: float,
    other_weight: float,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """``a ← a + weight · (v − a) + other_weight · (o − a)`` for every three tensors: one pass for an average of three models.

    A running mean ``a + (v − a) / (n + 1)`` that is then pulled to the model ``o`` with share ``1 − α`` (ZSCL's ensemble with
    WiSE) has ``weight = α / (n + 1)`` and ``other_weight = 1 − α``. Everything else is as in :func:`average_`.

    Args:
        averages: tensors that are updated, each of them once; float32, float64, bfloat16 or float16, of any shape and layout.
        values: tensors of the same shapes and device, in the same order; any of these dtypes.
        others: the same once more.
        weight: share of ``values`` in the result.
        other_weight: share of ``others``.
        rounding: of 16-bit averages, ``"nearest"`` or ``"stochastic"``.
        seed: of stochastic rounding; from torch's default generator when None.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Raises:
        ValueError: as for :func:`average_`.
        TypeError: as for :func:`average_`.

    Source: ZSCL (Zheng et al., 2023), section 3.3, and its public code (``we_wise``); Wortsman et al., 2022.
    """
    check_numbers(rounding, seed, weight=weight, other_weight=other_weight)
    lists = (list(averages), list(values), list(others))
    _run(lists, float(weight), float(other_weight), rounding, seed, backend)


def _run(
    lists: tuple[list[Tensor], ...],
    weight: float,
    other_weight: float,
    rounding: str,
    seed: int | None,
    backend: str | None,
) -> None:
    if rounding == "nearest" and _at_once(lists, weight, other_weight, backend):
        return
    with torch.no_grad():
        _by_plan(lists, weight, other_weight, rounding, seed, backend)


def _by_plan(
    lists: tuple[list[Tensor], ...],
    weight: float,
    other_weight: float,
    rounding: str,
    seed: int | None,
    backend: str | None,
) -> None:
    """Any backend, with the checks of the arguments and the copies that it needs."""
    averages = lists[0]
    found = plan.find(lists)
    if not averages:
        return
    if rounding == "stochastic":
        seed = int(philox.draw_seed()) if seed is None else seed
    elif found.halves and not torch.compiler.is_compiling():
        warn_of_stalling(found.halves, max(abs(weight), abs(other_weight)))
    chosen = dispatch.choose("average_", averages[0].device, backend)
    flat = found.flatten(lists)
    others = flat[2] if len(flat) == 3 else []
    if chosen == "reference":
        reference.average_(flat[0], flat[1], weight, others, other_weight, seed)
    else:
        autograd.run(chosen, found, flat[0], flat[1], weight, others, other_weight, seed)
        torch.autograd.graph.increment_version(averages)
    found.write_back(averages, flat[0])


_refused: set[tuple[int, int]] = set()
"""Lists, by length and first address, that the operator refused: what needs copies is not tried in vain each time."""


def _at_once(lists: tuple[list[Tensor], ...], weight: float, other_weight: float, backend: str | None) -> bool:
    """Hand lists straight to the compiled operator, whose own checks cost a tenth of those in Python; whether it took them.

    It refuses, before any work, what is wrong and what has to be copied first. The plan then finds the words, or makes the copies.
    """
    averages = lists[0]
    if torch.compiler.is_compiling() or not averages or type(averages[0]) not in plan.PLAIN:
        return False
    first = averages[0]
    if first.device.type != "cpu" or first.layout != torch.strided:
        return False
    where = len(averages), first.data_ptr()
    if where in _refused or dispatch.choose("average_", first.device, backend) != "cpu":
        return False
    most = max(abs(weight), abs(other_weight))
    if 0 < most < max(RESOLUTION.values()) and any(getattr(a, "dtype", None) in RESOLUTION for a in averages):
        return False  # may be worth a warning
    others = lists[2] if len(lists) == 3 else []
    try:
        with torch._C._AutoDispatchBelowAutograd():  # a fifth of what entering torch.no_grad() costs
            autograd.operator(averages, lists[1], weight, others, other_weight, None)
    except (RuntimeError, TypeError):
        if len(_refused) >= 64:
            _refused.clear()
        _refused.add(where)
        return False
    torch.autograd.graph.increment_version(averages)
    return True

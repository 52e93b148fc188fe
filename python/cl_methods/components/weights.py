"""Copies of a model's weights, and the pull towards them that has a closed form.

All of it works element by element, so processes of which each holds some rows of the weights (:mod:`cl_methods.sharding`) do
their own and exchange nothing, but for the value of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import cl_kernels as clk
from cl_methods import ranks
from cl_methods.sharding import aligned, is_sharded, local

_BUCKET = 1 << 24


def snapshot(parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Detached copies of the named parameters."""
    return {name: value.detach().clone() for name, value in parameters}


@torch.no_grad()
def assign(parameters: Sequence[tuple[str, Tensor]], source: Mapping[str, Tensor]) -> None:
    """``θ ← θ_source`` in place and to the bit, which a move of weight 1 is not."""
    held, given = _rows(parameters, source)
    torch._foreach_copy_(held, given)


@torch.no_grad()
def move_towards(parameters: Sequence[tuple[str, Tensor]], target: Mapping[str, Tensor], weight: float) -> None:
    """``θ ← θ + weight (θ_target − θ)`` in place, by one :func:`cl_kernels.average_` call.

    Args:
        parameters: named tensors that change.
        target: what they move to, by name.
        weight: share of the target in the result, 0 to 1.

    Raises:
        KeyError: the target lacks a name.
    """
    held, given = _rows(parameters, target)
    clk.average_(held, given, weight)


@torch.no_grad()
def move_between(
    parameters: Sequence[tuple[str, Tensor]],
    target: Mapping[str, Tensor],
    weight: float,
    other: Mapping[str, Tensor],
    other_weight: float,
) -> None:
    """``θ ← θ + weight (θ_target − θ) + other_weight (θ_other − θ)`` in place, by one :func:`cl_kernels.blend_` call.

    Args:
        parameters: named tensors that change.
        target, other: what they move to, by name.
        weight, other_weight: shares of the two in the result.

    Raises:
        KeyError: one of the two lacks a name.
    """
    held, one, two = _rows(parameters, target, other)
    clk.blend_(held, one, two, weight, other_weight)


def _rows(parameters: Sequence[tuple[str, Tensor]], *others: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The rows of every parameter that are here, and the same rows of what stands under its name in each of ``others``."""
    held = [(name, value.detach(), local(value.detach())) for name, value in parameters]
    found = [[rows for *_, rows in held]]
    found += [[aligned(other[name], value) for name, value, _ in held] for other in others]
    return found


@torch.no_grad()
def consolidation_value(
    parameters: Sequence[tuple[str, Tensor]],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``Σ Ω (θ − θ̄)²`` over every scalar, Ω = 1 without ``importance``: a scalar without gradient, for the log."""
    whole = [(name, value) for name, value in parameters if not is_sharded(value)]
    parts = [(name, value) for name, value in parameters if is_sharded(value)]
    found = [_squares(some, anchor, importance) for some in (whole, parts) if some]
    if parts:
        ranks.sum_(found[-1:])
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def _squares(
    parameters: Sequence[tuple[str, Tensor]], anchor: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None
) -> Tensor:
    """The sum over the rows that are here."""
    values, anchors, *weights = _rows(parameters, anchor, *([] if importance is None else [importance]))
    squares = []
    for some in _buckets(values):
        moved = torch._foreach_sub(values[some], anchors[some])
        if not weights:
            # Not from norms: torch's fp32 norm on a CPU is 0.3 % off for 25 million scalars.
            torch._foreach_mul_(moved, moved)
            squares.append(torch.stack([one.sum() for one in moved]).sum())
        else:
            weighted = torch._foreach_mul(moved, weights[0][some])
            squares.append(torch.stack([(one * two).sum() for one, two in zip(weighted, moved, strict=True)]).sum())
    return torch.stack(squares).sum()


@torch.no_grad()
def fold_consolidation_gradient(
    parameters: Sequence[tuple[str, nn.Parameter]],
    anchor: Mapping[str, Tensor],
    strength: float,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """``∇ ← ∇ + 2 λ Ω (θ − θ̄)``: the gradient of ``λ Σ Ω (θ − θ̄)²``, without building a graph for it.

    Parameters without a gradient have not moved away from the anchor and are left alone. Temporary memory is bounded.

    Args:
        parameters: named parameters after the backward pass.
        anchor: θ̄ by name.
        strength: λ.
        importance: Ω by name, each in its parameter's shape; 1 when None.
    """
    moving = [(name, value) for name, value in parameters if value.grad is not None]
    gradients = [local(value.grad) for _, value in moving]
    values, anchors, *weights = _rows(moving, anchor, *([] if importance is None else [importance]))
    for some in _buckets(values):
        pull = torch._foreach_sub(values[some], anchors[some])
        if weights:
            torch._foreach_mul_(pull, weights[0][some])
        torch._foreach_add_(gradients[some], pull, alpha=2 * strength)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Which tensors to take together: at most about 16.8 million scalars; cuts depend on sizes only."""
    first, size = 0, 0
    for number, one in enumerate(tensors):
        if number > first and size + one.numel() > _BUCKET:
            yield slice(first, number)
            first, size = number, 0
        size += one.numel()
    if first < len(tensors):
        yield slice(first, len(tensors))

"""Copies of a model's weights, and the pull towards them that has a closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import cl_kernels as clk

_BUCKET = 1 << 24


def snapshot(parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Detached copies of the named parameters."""
    return {name: value.detach().clone() for name, value in parameters}


@torch.no_grad()
def assign(parameters: Sequence[tuple[str, Tensor]], source: Mapping[str, Tensor]) -> None:
    """``θ ← θ_source`` in place and to the bit, which a move of weight 1 is not."""
    torch._foreach_copy_([value.detach() for _, value in parameters], [source[name] for name, _ in parameters])


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
    clk.average_([value.detach() for _, value in parameters], [target[name] for name, _ in parameters], weight)


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
    names = [name for name, _ in parameters]
    given = [value.detach() for _, value in parameters]
    clk.blend_(given, [target[n] for n in names], [other[n] for n in names], weight, other_weight)


@torch.no_grad()
def consolidation_value(parameters: Sequence[tuple[str, Tensor]], anchor: Mapping[str, Tensor]) -> Tensor:
    """``Σ ||θ − θ̄||²`` over every scalar: a scalar without gradient, for the log."""
    squares = [
        torch.stack(torch._foreach_norm(torch._foreach_sub(values, anchors))).square().sum()
        for values, anchors in _buckets([(value.detach(), anchor[name]) for name, value in parameters])
    ]
    return torch.stack(squares).sum()


@torch.no_grad()
def fold_consolidation_gradient(
    parameters: Sequence[tuple[str, nn.Parameter]], anchor: Mapping[str, Tensor], strength: float
) -> None:
    """``∇ ← ∇ + 2 λ (θ − θ̄)``: the gradient of ``λ Σ ||θ − θ̄||²``, without building a graph for it.

    Parameters without a gradient have not moved away from the anchor and are left alone. Temporary memory is bounded.

    Args:
        parameters: named parameters after the backward pass.
        anchor: θ̄ by name.
        strength: λ.
    """
    moved = [(value.grad, value.detach(), anchor[name]) for name, value in parameters if value.grad is not None]
    gradients = iter(_buckets([(gradient, value) for gradient, value, _ in moved]))
    for values, anchors in _buckets([(value, start) for _, value, start in moved]):
        torch._foreach_add_(next(gradients)[0], torch._foreach_sub(values, anchors), alpha=2 * strength)


def _buckets(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The pairs in lists of at most about 16.8 million scalars; cuts depend on sizes only."""
    left: list[Tensor] = []
    right: list[Tensor] = []
    size = 0
    for one, other in pairs:
        if left and size + one.numel() > _BUCKET:
            yield left, right
            left, right, size = [], [], 0
        left.append(one)
        right.append(other)
        size += one.numel()
    if left:
        yield left, right

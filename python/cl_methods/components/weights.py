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
def consolidation_value(
    parameters: Sequence[tuple[str, Tensor]],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``Σ Ω (θ − θ̄)²`` over every scalar, Ω = 1 without ``importance``: a scalar without gradient, for the log."""
    squares = []
    for names, values, anchors in _buckets([(name, value.detach(), anchor[name]) for name, value in parameters]):
        moved = torch._foreach_sub(values, anchors)
        if importance is None:
            # Not from norms: torch's fp32 norm on a CPU is 0.3 % off for 25 million scalars.
            torch._foreach_mul_(moved, moved)
            squares.append(torch.stack([one.sum() for one in moved]).sum())
        else:
            weighted = torch._foreach_mul(moved, [importance[name] for name in names])
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
    gradients = {name: value.grad for name, value in parameters if value.grad is not None}
    moving = [(name, value.detach(), anchor[name]) for name, value in parameters if name in gradients]
    for names, values, anchors in _buckets(moving):
        pull = torch._foreach_sub(values, anchors)
        if importance is not None:
            torch._foreach_mul_(pull, [importance[name] for name in names])
        torch._foreach_add_([gradients[name] for name in names], pull, alpha=2 * strength)


def _buckets(triples: Sequence[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[list[str], list[Tensor], list[Tensor]]]:
    """Names and pairs of tensors in lists of at most about 16.8 million scalars; cuts depend on sizes only."""
    names: list[str] = []
    left: list[Tensor] = []
    right: list[Tensor] = []
    size = 0
    for name, one, other in triples:
        if left and size + one.numel() > _BUCKET:
            yield names, left, right
            names, left, right, size = [], [], [], 0
        names.append(name)
        left.append(one)
        right.append(other)
        size += one.numel()
    if left:
        yield names, left, right

"""Copies of a model's weights, and the pull towards them that has a closed form.

All of it works element by element, so processes of which each holds some rows of the weights (:mod:`cl_methods.sharding`) do
their own and exchange nothing, but for the value of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import cl_kernels as clk
from cl_kernels import host_stream
from cl_kernels.squared_distance import add_difference_, compiled, distance_value
from cl_methods import ranks
from cl_methods.components.host_weights import HostWeights
from cl_methods.sharding import aligned, is_sharded, local

_BUCKET = {"cpu": 1 << 20, "cuda": 1 << 22}
"""Scalars whose differences to the anchor exist together: few enough to stay in the last cache of the device, so that memory is
read and written once, and the tensors beside the weights take 4 MiB (16 MiB on a GPU)."""


def snapshot(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Detached copies of the named parameters."""
    return {name: value.detach().clone() for name, value in parameters}


@torch.no_grad()
def sharing(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights``, with the tensor of ``others`` in place of every one that is equal to it, so that one copy serves both.

    Neither may be written to afterwards, unless both are meant. Waits for the device.

    Args:
        weights: tensors of any shape, by name, here or on the host.
        others: what they may be equal to, of the same shapes, by name; names may be missing.
    """
    return {
        name: others[name].detach() if name in others and _equal(value, others[name]) else value
        for name, value in weights.items()
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    if any(value.is_meta or isinstance(value, FakeTensor) for value in (one, other)):
        return False  # tensors without data, in a rehearsal: nothing is known to be equal
    return torch.equal(one.to(other.device), other)


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
    for held, given in _on_device(_rows(parameters, target), target):
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
    for held, one, two in _on_device(_rows(parameters, target, other), target, other):
        clk.blend_(held, one, two, weight, other_weight)


def _rows(parameters: Sequence[tuple[str, Tensor]], *others: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The rows of every parameter that are here, and the same rows of what stands under its name in each of ``others``."""
    held = [(name, value.detach(), local(value.detach())) for name, value in parameters]
    found = [[rows for *_, rows in held]]
    for other in others:
        given = other.arriving if isinstance(other, HostWeights) else other.__getitem__
        found.append([aligned(given(name), value) for name, value, _ in held])
    return found


def _on_device(columns: list[list[Tensor]], *others: Mapping[str, Tensor]) -> Iterator[list[list[Tensor]]]:
    """The columns at once where all lie where they are read, else bucket by bucket; ``others`` are the sources of the last ones."""
    return _buckets(columns, *others) if _on_host(*others) else iter([columns])


def _on_host(*others: Mapping[str, Tensor] | None) -> bool:
    return any(isinstance(other, HostWeights) for other in others)


@torch.no_grad()
def consolidation_value(
    parameters: Sequence[tuple[str, Tensor]],
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """``Σ Ω (θ − θ̄)²`` over every scalar, Ω = 1 without ``importance``: a scalar without gradient, for the log.

    Weights and anchor are read once: in one operation that allocates nothing where the compiled library takes them, elsewhere
    with 4 MiB of their differences at a time (16 MiB on a GPU). Anchor and importance may lie on the host.
    """
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
    others = [anchor] if importance is None else [anchor, importance]
    held = _rows(parameters, *others)
    name = "squared_distance" if importance is None else "weighted_squared_distance"
    if not _on_host(*others) and compiled([one for column in held for one in column], name):
        return distance_value(*held)
    squares = []
    for values, anchors, *weights in _buckets(held, *others):
        moved = torch._foreach_sub(values, anchors)
        # Not from norms: torch's fp32 norm on a CPU is 0.3 % off for 25 million scalars.
        torch._foreach_mul_(moved, moved)
        if weights:
            torch._foreach_mul_(moved, weights[0])
        squares.append(torch.stack([one.sum() for one in moved]).sum())
        del moved  # before the next ones are made
    return torch.stack(squares).sum()


@torch.no_grad()
def fold_consolidation_gradient(
    parameters: Sequence[tuple[str, nn.Parameter]],
    anchor: Mapping[str, Tensor],
    strength: float,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """``∇ ← ∇ + 2 λ Ω (θ − θ̄)``: the gradient of ``λ Σ Ω (θ − θ̄)²``, without building a graph for it.

    One pass: weights, anchor (and Ω) are read once, gradients read and written once, in one operation that allocates nothing where
    the compiled library takes them, elsewhere with 4 MiB of differences at a time (16 MiB on a GPU). They are taken before
    anything is scaled: ``∇ + 2 λ θ − 2 λ θ̄`` would need none of them, and lose to rounding what θ has moved. Parameters without
    a gradient have not moved away from the anchor and are left alone.

    Args:
        parameters: named parameters after the backward pass.
        anchor: θ̄ by name, here or on the host.
        strength: λ.
        importance: Ω by name, each in its parameter's shape, here or on the host; 1 when None.
    """
    moving = [(name, value) for name, value in parameters if value.grad is not None]
    if not moving:
        return
    gradients = [local(value.grad) for _, value in moving]
    others = [anchor] if importance is None else [anchor, importance]
    held = _rows(moving, *others)
    if not _on_host(*others) and compiled([*gradients, *(one for column in held for one in column)], "add_difference_"):
        add_difference_(gradients, held[0], held[1], 2 * strength, *held[2:])
        return
    for some, values, anchors, *weights in _buckets([gradients, *held], *others):
        pull = torch._foreach_sub(values, anchors)
        if weights:
            torch._foreach_addcmul_(some, pull, weights[0], value=2 * strength)
        else:
            torch._foreach_add_(some, pull, alpha=2 * strength)
        del pull  # before the next one is made


def staging_bytes(weights: Mapping[str, Tensor], kind: str = "cuda") -> int:
    """What reading ``weights`` (any shapes) from the host takes of a device of this ``kind``: two buckets."""
    shapes = [torch.empty_like(local(value), device="meta") for value in weights.values()]
    buckets = _cut([shapes], _BUCKET.get(kind, _BUCKET["cpu"]))
    return host_stream.staging_bytes([column for (column,) in buckets])


def _buckets(columns: Sequence[Sequence[Tensor]], *others: Mapping[str, Tensor]) -> Iterator[list[list[Tensor]]]:
    """The columns in parts of at most about :data:`_BUCKET` scalars of each; cuts depend on sizes only.

    Tensors that are larger are cut into pieces where all that stand in their row are contiguous. ``others`` are the sources of the
    last columns: what lies on the host is brought to the device.
    """
    cut = list(_cut(columns, _BUCKET.get(columns[0][0].device.type, _BUCKET["cpu"])))
    sources = (*[None] * (len(columns) - len(others)), *others)
    parts = [[bucket[place] for bucket in cut] for place in range(len(columns))]
    found = [
        source.stream(column) if isinstance(source, HostWeights) else iter(column)
        for source, column in zip(sources, parts, strict=True)
    ]
    return map(list, zip(*found, strict=True))


def _cut(columns: Sequence[Sequence[Tensor]], most: int) -> Iterator[list[list[Tensor]]]:
    bucket: list[tuple[Tensor, ...]] = []
    size = 0
    for row in zip(*columns, strict=True):
        for piece in _pieces(row, most):
            if bucket and size + piece[0].numel() > most:
                yield [list(column) for column in zip(*bucket, strict=True)]
                bucket, size = [], 0
            bucket.append(piece)
            size += piece[0].numel()
    if bucket:
        yield [list(column) for column in zip(*bucket, strict=True)]


def _pieces(row: tuple[Tensor, ...], most: int) -> Iterable[tuple[Tensor, ...]]:
    if row[0].numel() <= most or not all(one.is_contiguous() for one in row):
        return [row]
    return zip(*(one.view(-1).split(most) for one in row), strict=True)

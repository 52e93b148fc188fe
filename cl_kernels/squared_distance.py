"""The squared distance of two lists of tensors, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library

_CHUNK = 1 << 24
"""Elements whose differences are held together: 64 MiB in float32."""


def squared_distance(tensors: list[Tensor], references: list[Tensor]) -> Tensor:
    """``Σ ‖q − k‖²`` as a 0-d tensor; differentiable in the first list.

    Where :func:`compiled` holds, one operation each way, which allocates nothing but its result; elsewhere a few for whole lists.

    Args:
        tensors: of one dtype and device, any shapes.
        references: the same shapes.
    """
    return _SquaredDistance.apply(len(tensors), *tensors, *(p.detach() for p in references))


def compiled(tensors: Sequence[Tensor], operation: str = "squared_distance") -> bool:
    """Whether the compiled library takes these tensors, any shapes: on the CPU, contiguous, of one dtype, float32 or float64.

    The meta device stands for the CPU. ``operation`` is the one that is going to run: a library may be older than it.
    """
    first = tensors[0]
    if first.device.type not in ("cpu", "meta") or first.dtype not in (torch.float32, torch.float64):
        return False
    if dispatch.choose("average_", first.device) != "cpu":
        return False
    if not first.is_meta and not library.has_kernel(library.COMPILED, operation, "CPU"):
        return False
    return all(t.is_contiguous() and t.dtype == first.dtype and t.device == first.device for t in tensors)


def distance_value(tensors: list[Tensor], references: list[Tensor], weights: list[Tensor] | None = None) -> Tensor:
    """``Σ w (q − k)²`` over every scalar as a 0-d tensor without gradient, w = 1 without ``weights``; one operation.

    Args:
        tensors: for which :func:`compiled` holds.
        references: the same shapes and dtype.
        weights: the same shapes and dtype.
    """
    if weights is None:
        return library.operator("squared_distance", "cpu")(tensors, references)
    return library.operator("weighted_squared_distance", "cpu")(tensors, references, weights)


def add_difference_(
    gradients: list[Tensor],
    tensors: list[Tensor],
    references: list[Tensor],
    factor: float,
    weights: list[Tensor] | None = None,
) -> None:
    """``∇ ← ∇ + factor · w (q − k)`` in place, w = 1 without ``weights``; one operation, which allocates nothing.

    Args:
        gradients: for which :func:`compiled` holds for ``"add_difference_"``.
        tensors, references: the same shapes and dtype.
        factor: of every difference.
        weights: the same shapes and dtype.
    """
    library.operator("add_difference_", "cpu")(gradients, tensors, references, weights or [], factor)


class _SquaredDistance(torch.autograd.Function):
    """``Σ ‖q − k‖²`` over two lists of tensors; its gradient is ``2 (q − k)``."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Tensor:
        ctx.number, ctx.compiled = number, compiled(list(tensors))
        ctx.save_for_backward(*tensors)
        if ctx.compiled:
            return library.operator("squared_distance", "cpu")(tensors[:number], tensors[number:])
        norms: list[Tensor] = []
        for start, end in _chunks(tensors[:number]):
            differences = torch._foreach_sub(tensors[start:end], tensors[number + start : number + end])
            norms += torch._foreach_norm(differences)
            del differences
        return torch.stack(norms).square_().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        number = ctx.number
        wanted = [i for i in range(number) if ctx.needs_input_grad[1 + i]]
        tensors = ctx.saved_tensors
        pairs = [tensors[i] for i in wanted], [tensors[number + i] for i in wanted]
        if ctx.compiled and not torch.is_grad_enabled():
            gradients = library.operator("squared_distance_backward", "cpu")(grads[0], *pairs)
        else:  # by operations that can be differentiated again
            gradients = torch._foreach_mul(torch._foreach_sub(*pairs), 2 * grads[0])
        found = dict(zip(wanted, gradients, strict=True))
        return (None, *(found.get(i) for i in range(number)), *(None,) * number)


def _chunks(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    ranges, start, elements = [], 0, 0
    for i, tensor in enumerate(tensors):
        elements += tensor.numel()
        if elements >= _CHUNK or i == len(tensors) - 1:
            ranges.append((start, i + 1))
            start, elements = i + 1, 0
    return ranges


_library = library.definitions[library.COMPILED]
_library._register_fake("squared_distance", lambda tensors, references: tensors[0].new_empty(()))
_library._register_fake(
    "squared_distance_backward", lambda grad, tensors, references: list(map(torch.empty_like, tensors))
)
_library._register_fake("weighted_squared_distance", lambda tensors, references, weights: tensors[0].new_empty(()))
_library._register_fake("add_difference_", lambda gradients, tensors, references, weights, factor: None)

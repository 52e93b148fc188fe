"""Experts that live as separate modules, as the stacked tensors that the kernel takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = (("down_proj", "weight"), ("down_proj", "bias"), ("up_proj", "weight"), ("up_proj", "bias"))


class Chosen:
    """How many samples chose each expert in one forward pass, for its backward pass.

    On a GPU the counts travel to the host while the forward pass goes on, so that asking for them waits at most for that.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def set(self, usage: Tensor) -> None:
        """``usage`` (E,) int64."""
        if usage.is_cuda:
            self._counts = torch.empty(usage.shape, dtype=usage.dtype, pin_memory=True).copy_(usage, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(usage.device))  # which need not be the current device
        else:
            self._counts = usage

    def read(self) -> list[int]:
        """The counts."""
        if self._arrived is not None:
            self._arrived.synchronize()
        assert self._counts is not None, "the backward pass of experts that no forward pass has used"
        return self._counts.tolist()


class _Stack(torch.autograd.Function):
    """Forward: ``torch.stack`` of each of the four fields. Backward: a slice for each expert that was chosen, None for the others.

    The difference between None and zero is one that optimisers make: AdamW skips a parameter without gradient, momentum included.
    """

    @staticmethod
    def forward(ctx: Any, chosen: Chosen, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.chosen, ctx.experts = chosen, len(parameters) // len(FIELDS)
        ctx.set_materialize_grads(False)
        return tuple(torch.stack(parameters[i :: len(FIELDS)]) for i in range(len(FIELDS)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        counts = ctx.chosen.read()
        slices = [None if grad is None else grad.unbind(0) for grad in grads]
        needed = ctx.needs_input_grad[1:]
        found = [field[e] if counts[e] and field is not None else None for e in range(ctx.experts) for field in slices]
        return (None, *(grad if need else None for grad, need in zip(found, needed, strict=True)))


def tensors(experts: Iterable[nn.Module]) -> list[Tensor]:
    """The four tensors of expert 0, those of expert 1, and so on.

    Args:
        experts: modules with ``down_proj`` and ``up_proj``.
    """
    return [getattr(getattr(expert, layer), field) for expert in experts for layer, field in FIELDS]


def stack(parameters: list[Tensor], chosen: Chosen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``down_weight`` (E, R, D), ``down_bias`` (E, R), ``up_weight`` (E, D, R), ``up_bias`` (E, D), differentiable in the experts.

    The copy is made anew on every call: nothing tells reliably that no weight has changed since the last one (``p.data.add_()``
    leaves no trace), and it costs a few percent of the adapters' work.

    Args:
        parameters: as :func:`tensors` gives them.
        chosen: gets the usage before the backward pass.
    """
    return _Stack.apply(chosen, *parameters)


def why_not(experts: nn.ModuleList) -> str | None:
    """Why these experts cannot run through the kernel, or None."""
    if len(experts) == 0:
        return "it has no experts"
    shapes = set()
    for i, expert in enumerate(experts):
        down, up = getattr(expert, "down_proj", None), getattr(expert, "up_proj", None)
        if type(down) is not nn.Linear or type(up) is not nn.Linear or down.bias is None or up.bias is None:
            return f"expert {i} has no down_proj and up_proj that are plain nn.Linear with bias"
        if type(getattr(expert, "non_linear_func", None)) is not nn.ReLU:
            return f"expert {i} has another activation than ReLU"
        if getattr(expert, "adapter_layer_norm_before", None) is not None:
            return f"expert {i} has a LayerNorm of its own"
        if not isinstance(getattr(expert, "scale", None), float) or not isinstance(expert.dropout, float):
            return f"expert {i} has a scale or dropout that is not a fixed number"
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in expert.modules()):
            return f"expert {i} has hooks, which the kernel would not run"
        shapes.add((down.in_features, down.out_features, up.in_features, up.out_features, expert.scale, expert.dropout))
    if len(shapes) > 1:
        return f"its experts differ in shape, scale or dropout: {sorted(shapes)}"
    width, rank, up_rank, out, _, _ = shapes.pop()
    if (width, rank) != (out, up_rank):
        return f"its experts map {width} -> {rank} and {up_rank} -> {out}"
    return None

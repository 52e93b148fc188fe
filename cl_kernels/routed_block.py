"""The adapted half of a residual block as one operation each way, for experts stacked or each for itself, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cl_kernels import dispatch, library
from cl_kernels.moe_adapter import dropout
from cl_kernels.moe_adapter.memory import empty_rows

FIELDS = 4
"""Tensors of an expert: down_weight (R, D), down_bias (R,), up_weight (D, R), up_bias (D,)."""


def serves(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether :func:`routed_block` takes these tensors: on the CPU, compiled, all of one dtype, float32 or float64.

    Stacked experts may be on the meta device too, which stands for the CPU; of others it takes values to know who gets a gradient.

    Args:
        x: (B, L, D).
        others: residual, router, noise and the experts' tensors, any shapes; those of experts last.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return False
    if x.is_meta:
        stacked = others[-FIELDS].dim() == 3
        return stacked and dispatch.choose("moe_adapter", x.device) == "cpu" and _alike(x, others)
    if x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu") or dispatch.choose("moe_adapter", x.device) != "cpu":
        return False
    if not library.has_kernel(
        library.COMPILED, "routed_block", "CPU"
    ):  # a library that was built before this operation
        return False
    return _alike(x, others)


def _alike(x: Tensor, others: Sequence[Tensor]) -> bool:
    return all(t.dtype == x.dtype and t.device == x.device for t in others)


def routed_block(
    x: Tensor,
    residual: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    noise: Tensor,
    experts: Sequence[Tensor],
    *,
    k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(residual + x) + Σ_{e ∈ top-k} g_e A_e(x)``, each sample routed by its token 0 with noisy gates.

    Differentiable once in everything but the noise. Of experts that are tensors of their own, one that nobody chose gets no
    gradient instead of one of zeros: AdamW skips a parameter without gradient, momentum included.

    Args:
        x: (B, L, D) tokens of each sample.
        residual: (B, L, D).
        w_gate: (D, E) router weight.
        w_noise: (D, E) weight of the noise's standard deviation.
        noise: (B, E) standard normal.
        experts: the four tensors of expert 0, then those of expert 1, and so on; or the four stacks, (E, …) each.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout_p: probability of zeroing a bottleneck element.
        seed: of the dropout, int64 () or :func:`~cl_kernels.moe_adapter.dropout.seed_of_part`; drawn when None.

    Returns:
        The sum (B, L, D), and ``usage`` (E,) int64, how many samples chose each expert.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), equations 2 to 6.
    """
    seed = (dropout.draw_seed(x.device) if seed is None else seed) if dropout_p > 0.0 else None
    return _RoutedBlock.apply(x, residual, w_gate, w_noise, noise, seed, k, scale, dropout_p, *experts)


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        x, residual, w_gate, w_noise, noise, seed, k, scale, dropout_p, *experts = call
        ctx.stacked = _stacked(experts)
        fields = _fields(experts)
        out, usage, gates, ids, hidden = library.operator("routed_block", "cpu")(
            x, residual, w_gate, w_noise, noise, *fields, seed, k, scale, dropout_p, any(ctx.needs_input_grad)
        )
        ctx.mark_non_differentiable(usage)
        ctx.set_materialize_grads(False)
        weights = [t for i in _READ for t in experts[i::FIELDS]]
        ctx.save_for_backward(x, w_gate, w_noise, noise, gates, ids, hidden, usage, *weights)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return out, usage

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (
            need_x,
            need_residual,
            need_gate,
            need_noise,
            *_,
        ) = ctx.needs_input_grad
        needed = ctx.needs_input_grad[9:]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, w_gate, w_noise, noise, gates, ids, hidden, usage, *weights = ctx.saved_tensors
        count = len(weights) // len(_READ)
        fields = [weights[i * count : (i + 1) * count] for i in range(len(_READ))]
        grad_x, grad_gate, grad_noise, *stacks = library.operator("routed_block_backward", "cpu")(
            grad,
            x,
            w_gate,
            w_noise,
            noise,
            gates,
            ids,
            *(list(field[0].unbind(0)) if ctx.stacked else field for field in fields),
            hidden,
            ctx.scale,
            ctx.dropout_p,
            need_x,
            need_gate or need_noise,
            any(needed),
        )
        found: list[Tensor | None] = [None] * len(needed)
        if ctx.stacked:
            found = [stack if need else None for stack, need in zip(stacks, needed, strict=True)]
        elif any(needed):
            slices = [stack.unbind(0) for stack in stacks]
            for e, used in enumerate(usage.tolist()):
                for i in range(FIELDS * bool(used)):
                    found[FIELDS * e + i] = slices[i][e] if needed[FIELDS * e + i] else None
        return (
            grad_x if need_x else None,
            grad if need_residual else None,
            grad_gate if need_gate else None,
            grad_noise if need_noise else None,
            *(None,) * 5,
            *found,
        )


_READ = (0, 2, 3)
"""Fields whose values the backward pass reads."""


def _stacked(experts: Sequence[Tensor]) -> bool:
    return len(experts) == FIELDS and experts[0].dim() == 3


def _fields(experts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The E tensors of each field."""
    if _stacked(experts):
        return [list(stack.unbind(0)) for stack in experts]
    return [list(experts[i::FIELDS]) for i in range(FIELDS)]


def _fake_forward(
    x: Tensor,
    residual: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    noise: Tensor,
    down_weight: list[Tensor],
    down_bias: list[Tensor],
    up_weight: list[Tensor],
    up_bias: list[Tensor],
    seed: Tensor | None,
    k: int,
    scale: float,
    dropout_p: float,
    save_hidden: bool,
) -> tuple[Tensor, ...]:
    batch, length, _ = x.shape
    return (
        empty_rows(x),
        x.new_empty((len(down_weight),), dtype=torch.int64),
        x.new_empty((batch, k)),
        x.new_empty((batch, k), dtype=torch.int64),
        x.new_empty((batch, k, length, down_weight[0].shape[0]) if save_hidden else (0,)),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor,
    noise: Tensor,
    gates: Tensor,
    expert_ids: Tensor,
    down_weight: list[Tensor],
    up_weight: list[Tensor],
    up_bias: list[Tensor],
    hidden: Tensor,
    scale: float,
    dropout_p: float,
    need_x: bool,
    need_router: bool,
    need_experts: bool,
) -> tuple[Tensor, ...]:
    experts, (rank, width) = len(down_weight), down_weight[0].shape
    shapes = (experts, rank, width), (experts, rank), (experts, width, rank), (experts, width)
    return (
        empty_rows(x) if need_x else x.new_empty(0),
        *(w_gate.new_empty(w_gate.shape if need_router else (0,)) for _ in range(2)),
        *(x.new_empty(shape if need_experts else (0,)) for shape in shapes),
    )


_library = library.definitions[library.COMPILED]
_library._register_fake("routed_block", _fake_forward)
_library._register_fake("routed_block_backward", _fake_backward)

"""The adapted half of a residual block as one operation each way, for experts that live as separate modules, on the CPU."""

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

    Args:
        x: (B, L, D).
        others: residual, router, noise and the experts' tensors, any shapes.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu") or dispatch.choose("moe_adapter", x.device) != "cpu":
        return False
    if not library.has_kernel(
        library.COMPILED, "routed_block", "CPU"
    ):  # a library that was built before this operation
        return False
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
) -> tuple[Tensor, Tensor]:
    """``(residual + x) + Σ_{e ∈ top-k} g_e A_e(x)``, each sample routed by its token 0 with noisy gates.

    Differentiable once in everything but the noise. An expert that nobody chose gets no gradient instead of one of zeros: AdamW
    skips a parameter without gradient, momentum included.

    Args:
        x: (B, L, D) tokens of each sample.
        residual: (B, L, D).
        w_gate: (D, E) router weight.
        w_noise: (D, E) weight of the noise's standard deviation.
        noise: (B, E) standard normal.
        experts: the four tensors of expert 0, then those of expert 1, and so on.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout_p: probability of zeroing a bottleneck element.

    Returns:
        The sum (B, L, D), and ``usage`` (E,) int64, how many samples chose each expert.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), equations 2 to 6.
    """
    seed = dropout.draw_seed(x.device) if dropout_p > 0.0 else None
    return _RoutedBlock.apply(x, residual, w_gate, w_noise, noise, seed, k, scale, dropout_p, *experts)


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        x, residual, w_gate, w_noise, noise, seed, k, scale, dropout_p, *experts = call
        fields = [experts[i::FIELDS] for i in range(FIELDS)]
        out, usage, gates, ids, hidden = library.operator("routed_block", "cpu")(
            x, residual, w_gate, w_noise, noise, *fields, seed, k, scale, dropout_p, any(ctx.needs_input_grad)
        )
        ctx.mark_non_differentiable(usage)
        ctx.set_materialize_grads(False)
        down_weight, _, up_weight, up_bias = fields
        ctx.save_for_backward(x, w_gate, w_noise, noise, gates, ids, hidden, usage, *down_weight, *up_weight, *up_bias)
        ctx.scale, ctx.dropout_p, ctx.experts = scale, dropout_p, len(down_weight)
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
        count = ctx.experts
        grad_x, grad_gate, grad_noise, *stacks = library.operator("routed_block_backward", "cpu")(
            grad,
            x,
            w_gate,
            w_noise,
            noise,
            gates,
            ids,
            weights[:count],
            weights[count : 2 * count],
            weights[2 * count :],
            hidden,
            ctx.scale,
            ctx.dropout_p,
            need_x,
            need_gate or need_noise,
            any(needed),
        )
        found: list[Tensor | None] = [None] * len(needed)
        if any(needed):
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

"""Registrations of the adapters: fake implementations, gradients, and the Triton kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.moe_adapter.memory import empty_rows

operator = partial(library.operator, "moe_adapter")


def _fake_forward(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    save_hidden: bool,
) -> tuple[Tensor, Tensor]:
    (batch, length, _), slots, rank = x.shape, expert_ids.shape[1], down_weight.shape[1]
    return empty_rows(x), x.new_empty((batch, slots, length, rank) if save_hidden else (0,))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    hidden: Tensor,
    scale: float,
    dropout_p: float,
    need_x: bool,
    need_gates: bool,
    need_experts: bool,
) -> tuple[Tensor, ...]:
    experts, rank, width = down_weight.shape
    shapes = (experts, rank, width), (experts, rank), (experts, width, rank), (experts, width)
    return (
        empty_rows(x) if need_x else x.new_empty(0),
        gates.new_empty(gates.shape if need_gates else (0,)),
        *(x.new_empty(shape if need_experts else (0,)) for shape in shapes),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, expert_ids, gates, down_weight, _, up_weight, up_bias, residual, _, scale, dropout_p, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, expert_ids, gates, down_weight, up_weight, up_bias, hidden)
    ctx.scale, ctx.dropout_p, ctx.has_residual = scale, dropout_p, residual is not None


def _backward(backend: str, ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    none = (None,) * 12
    if grad is None:
        return none
    need_x, _, need_gates, *need_weights, need_residual = ctx.needs_input_grad[:8]
    need_experts = any(need_weights)
    found: tuple[Tensor | None, ...] = (None,) * 6
    if need_x or need_gates or need_experts:
        found = library.operator("moe_adapter_backward", backend)(
            grad, *ctx.saved_tensors, ctx.scale, ctx.dropout_p, need_x, need_gates, need_experts
        )
    grad_x, grad_gates, *weights = found
    return (
        grad_x if need_x else None,
        None,
        grad_gates if need_gates else None,
        *(weight if needed else None for weight, needed in zip(weights, need_weights, strict=True)),
        grad if need_residual else None,
        *none[8:],
    )


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "moe_adapter: the kernels have no second derivative; pass backend='reference' to differentiate twice"
    )


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from cl_kernels.moe_adapter import triton_launch

    return triton_launch.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from cl_kernels.moe_adapter import triton_launch

    return triton_launch.backward(*args)


for _namespace, _backend in ((library.COMPILED, "cpu"), (library.TRITON, "triton")):
    _library = library.definitions[_namespace]
    _library._register_fake("moe_adapter", _fake_forward)
    _library._register_fake("moe_adapter_backward", _fake_backward)
    torch.library.register_autograd(
        f"{_namespace}::moe_adapter", partial(_backward, _backend), setup_context=_setup_context, lib=_library
    )
    torch.library.register_autograd(
        f"{_namespace}::moe_adapter_backward", _no_second_derivative, setup_context=lambda *a, **k: None, lib=_library
    )
for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("moe_adapter", _triton_forward, _key)
    library.definitions[library.TRITON].impl("moe_adapter_backward", _triton_backward, _key)

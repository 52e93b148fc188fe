"""Registrations of top-k gating: fake implementations, gradient, and the Triton kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.gating import reference
from cl_kernels.gating.reference import compute_dtype

operator = partial(library.operator, "top_k_gating")

FUSED_EXPERTS, FUSED_EXPERTS_FLOAT64 = 128, 32
"""Up to so many experts the Triton kernels' tiles fit the shared memory and the registers of every GPU."""


def fused(x: Tensor, experts: int) -> bool:
    """Whether the Triton kernels serve x (B, D) and so many experts; beyond, large products and a sort are torch's own."""
    return experts <= (FUSED_EXPERTS_FLOAT64 if x.dtype == torch.float64 else FUSED_EXPERTS)


def _sizes(x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int) -> tuple[int, int]:
    """(B, E), for those who call the operator itself; the public function has better sentences."""
    torch._check(
        x.dim() == 2 and w_gate.dim() == 2 and x.shape[1] == w_gate.shape[0], lambda: "x (B, D), w_gate (D, E)"
    )
    rows, experts = x.shape[0], w_gate.shape[1]
    torch._check(1 <= k <= experts, lambda: f"k: got {k}, expected 1 to {experts}")
    torch._check(w_noise is None or w_noise.shape == w_gate.shape, lambda: "w_noise: expected the shape of w_gate")
    fits = noise is None or (w_noise is not None and noise.dim() == 2 and noise.shape == (rows, experts))
    torch._check(fits, lambda: "noise: expected (B, E), and w_noise with it")
    return rows, experts


def _fake(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, experts = _sizes(x, w_gate, w_noise, noise, k)
    return (
        x.new_empty((rows, k), dtype=compute_dtype(x)),
        x.new_empty((rows, k), dtype=torch.int64),
        x.new_empty((experts,), dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_gate, w_noise, noise, _ = inputs
    gates, expert_ids, usage = output
    ctx.mark_non_differentiable(expert_ids, usage)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_gate, w_noise, noise, gates, expert_ids)


def gradients(
    grad: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None,
    noise: Tensor | None,
    gates: Tensor,
    expert_ids: Tensor,
    need_x: bool,
    need_gate: bool,
    need_noise: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of the softmax over the kept logits, spread over (B, E); then two thin matrix products per input.

    A few small PyTorch operations: E is at most some dozens, and written like this it can be differentiated again.
    """
    if torch.is_autocast_enabled(dispatch.autocast_device(x.device)):  # backward() was called inside autocast
        with torch.autocast(dispatch.autocast_device(x.device), enabled=False):
            return gradients(grad, x, w_gate, w_noise, noise, gates, expert_ids, need_x, need_gate, need_noise)
    compute = gates.dtype
    wide, gate = x.to(compute), w_gate.to(compute)
    kept = torch.ops.aten._softmax_backward_data(grad, gates, 1, compute)  # (B, k)
    logits = kept.new_zeros(x.shape[0], w_gate.shape[1]).scatter(
        1, expert_ids, kept
    )  # (B, E): ids of a row are distinct
    grad_x = logits @ gate.T if need_x else None
    grad_gate = (wide.T @ logits).to(w_gate.dtype) if need_gate else None
    grad_noise_weight = None
    if noise is not None and w_noise is not None and (need_x or need_noise):
        noise_weight = w_noise.to(compute)
        spread = torch.ops.aten.softplus_backward(logits * noise.to(compute), wide @ noise_weight, 1, 20)  # (B, E)
        if grad_x is not None:
            grad_x = torch.addmm(grad_x, spread, noise_weight.T)
        if need_noise:
            grad_noise_weight = (wide.T @ spread).to(w_noise.dtype)
    return None if grad_x is None else grad_x.to(x.dtype), grad_gate, grad_noise_weight


def fused_gradients(grad: Tensor, x: Tensor, w_gate: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """:func:`gradients` in two launches, unless it is to be differentiated again or E is beyond what the tiles hold."""
    if torch.is_grad_enabled() or not fused(x, w_gate.shape[1]):
        return gradients(grad, x, w_gate, *rest)
    *tensors, need_x, need_gate, need_noise = rest
    needs = (need_x, need_gate, need_noise and tensors[1] is not None)
    found = library.operator("top_k_gating_backward", "triton")(grad, x, w_gate, *tensors, *needs)
    return tuple(gradient if needed else None for gradient, needed in zip(found, needs, strict=True))


GRADIENTS = {"reference": gradients, "cpu": gradients, "triton": fused_gradients}
"""What computes the gradients of x, w_gate and w_noise for each backend."""


def _backward(backend: str, ctx: Any, grad_gates: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_gates is None:
        return (None,) * 5
    return (*GRADIENTS[backend](grad_gates, *ctx.saved_tensors, *ctx.needs_input_grad[:3]), None, None)


def _triton(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    _sizes(x, w_gate, w_noise, noise, k)
    if not fused(x, w_gate.shape[1]):
        return reference.top_k_gating(x, w_gate, w_noise, noise, k)
    from cl_kernels.gating import triton_kernels

    return triton_kernels.top_k_gating(x, w_gate, w_noise, noise, k)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None,
    noise: Tensor | None,
    gates: Tensor,
    expert_ids: Tensor,
    need_x: bool,
    need_gate: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        w_gate.new_empty(w_gate.shape if need_gate else (0,)),
        (w_gate if w_noise is None else w_noise).new_empty(w_gate.shape if need_noise else (0,)),
    )


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from cl_kernels.gating import triton_backward

    return triton_backward.top_k_gating_backward(*args)


for _namespace, _backend in ((library.COMPILED, "cpu"), (library.TRITON, "triton")):
    _library = library.definitions[_namespace]
    _library._register_fake("top_k_gating", _fake)
    torch.library.register_autograd(
        f"{_namespace}::top_k_gating", partial(_backward, _backend), setup_context=_setup_context, lib=_library
    )
library.definitions[library.TRITON]._register_fake("top_k_gating_backward", _fake_backward)
for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("top_k_gating", _triton, _key)
    library.definitions[library.TRITON].impl("top_k_gating_backward", _triton_backward, _key)

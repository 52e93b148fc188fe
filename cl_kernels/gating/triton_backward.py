"""Gradient of top-k gating in Triton: one launch over rows, one over the routers' weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.gating.triton_tiles import BLOCK_B, block_of, depth_of, load_tile, router_products

MANY_ROWS = 4096
"""From so many rows on the weights' gradients are products large enough for torch's own."""


@triton.jit(do_not_specialize=["B"])
def row_gradient_kernel(
    grad_ptr,  # [B, K]
    x_ptr,  # [B, D], read if NOISY
    w_gate_ptr,  # [D, E]
    w_noise_ptr,  # [D, E], read if NOISY
    noise_ptr,  # [B, E], read if NOISY
    gates_ptr,  # [B, K]
    expert_ids_ptr,  # [B, K] int64
    grad_x_ptr,  # [B, D] or None
    grad_logits_ptr,  # [B, E]
    grad_spread_ptr,  # [B, E], written if NOISY
    B,
    D,
    E,
    stride_xb,
    stride_xd,
    K: tl.constexpr,
    NOISY: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of a block of rows' logits x w_gate, of their spreads x w_noise, and of x."""
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    columns = tl.arange(0, BLOCK_E)[None, :]
    real_rows = rows < B
    real = real_rows[:, None] & (columns < E)
    inner = tl.zeros((BLOCK_B,), COMPUTE)
    for j in range(K):
        gate = tl.load(gates_ptr + rows * K + j, mask=real_rows, other=0.0)
        inner += gate * tl.load(grad_ptr + rows * K + j, mask=real_rows, other=0.0)
    logits = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    for j in range(K):
        gate = tl.load(gates_ptr + rows * K + j, mask=real_rows, other=0.0)
        kept = gate * (tl.load(grad_ptr + rows * K + j, mask=real_rows, other=0.0) - inner)
        expert = tl.load(expert_ids_ptr + rows * K + j, mask=real_rows, other=-1)
        logits = tl.where(columns == expert[:, None], kept[:, None], logits)
    where = rows[:, None] * E + columns
    tl.store(grad_logits_ptr + where, logits, mask=real)
    spread = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    if NOISY:
        spread, _ = router_products(
            rows, x_ptr, w_noise_ptr, w_noise_ptr, B, D, E, stride_xb, stride_xd,
            False, COMPUTE, COMPUTE, BLOCK_B, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        noise = tl.load(noise_ptr + where, mask=real, other=0.0).to(COMPUTE)
        spread = logits * noise / (1.0 + tl.exp(-spread))  # softplus' = sigmoid
        tl.store(grad_spread_ptr + where, spread, mask=real)
    if grad_x_ptr is not None:
        experts = tl.arange(0, BLOCK_E)
        for start in range(0, D, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            w = load_tile(w_gate_ptr, experts, depth, 1, E, E, D, COMPUTE)
            total = tl.dot(logits, w, input_precision="ieee", out_dtype=COMPUTE)
            if NOISY:
                w = load_tile(w_noise_ptr, experts, depth, 1, E, E, D, COMPUTE)
                total = tl.dot(spread, w, total, input_precision="ieee", out_dtype=COMPUTE)
            inside = real_rows[:, None] & (depth < D)[None, :]
            total = total.to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + rows[:, None] * D + depth[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["B"])
def weight_gradient_kernel(
    x_ptr,  # [B, D]
    grad_logits_ptr,  # [B, E]
    grad_spread_ptr,  # [B, E] or None
    grad_gate_ptr,  # [D, E] or None
    grad_noise_ptr,  # [D, E] or None
    B,
    D,
    E,
    stride_xb,
    stride_xd,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """xᵀ times the gradients of logits and spreads, for a block of x's features, over all rows in their order."""
    depth = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_E)
    gate = tl.zeros((BLOCK_D, BLOCK_E), COMPUTE)
    noise = tl.zeros((BLOCK_D, BLOCK_E), COMPUTE)
    for start in range(0, B, BLOCK_B):
        rows = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        x = load_tile(x_ptr, depth.to(tl.int64), rows, stride_xd, stride_xb, D, B, COMPUTE)
        if grad_gate_ptr is not None:
            grad = load_tile(grad_logits_ptr, rows, columns, E, 1, B, E, COMPUTE)
            gate = tl.dot(x, grad, gate, input_precision="ieee", out_dtype=COMPUTE)
        if grad_noise_ptr is not None:
            grad = load_tile(grad_spread_ptr, rows, columns, E, 1, B, E, COMPUTE)
            noise = tl.dot(x, grad, noise, input_precision="ieee", out_dtype=COMPUTE)
    where = depth[:, None] * E + columns[None, :]
    inside = (depth < D)[:, None] & (columns < E)[None, :]
    if grad_gate_ptr is not None:
        tl.store(grad_gate_ptr + where, gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    if grad_noise_ptr is not None:
        tl.store(grad_noise_ptr + where, noise.to(grad_noise_ptr.dtype.element_ty), mask=inside)


def warps_of(experts: int) -> int:
    """Of both kernels, so that neither Triton 3.6 nor 3.7 spills: 8 would in fp32 for 22 experts on sm_120, 4 for other numbers."""
    return 4 if block_of(experts) == 32 else 8


def top_k_gating_backward(
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
    """Gradients of x, w_gate and w_noise; with zero elements where they are not needed."""
    (rows, width), experts, slots = x.shape, w_gate.shape[1], gates.shape[1]
    grad_x = x.new_empty((rows, width) if need_x else (0,))
    grad_gate = w_gate.new_empty(w_gate.shape if need_gate else (0,))
    grad_noise = w_gate.new_empty((0,)) if w_noise is None else w_noise.new_empty(w_gate.shape if need_noise else (0,))
    if rows == 0 or width == 0:
        for empty in (grad_x, grad_gate, grad_noise):
            empty.zero_()
        return grad_x, grad_gate, grad_noise
    noisy = w_noise is not None and noise is not None and (need_x or need_noise)
    logits = gates.new_empty(rows, experts)
    spread = gates.new_empty(rows, experts) if noisy else None
    constants = {
        "COMPUTE": tl.float64 if gates.dtype == torch.float64 else tl.float32,
        "BLOCK_B": BLOCK_B,
        "BLOCK_D": depth_of(experts),
        "BLOCK_E": block_of(experts),
        "num_warps": warps_of(experts),
    }
    sizes = (rows, width, experts, *x.stride())
    with torch.cuda.device_of(x):
        row_gradient_kernel[(triton.cdiv(rows, BLOCK_B),)](
            grad.contiguous(),
            x,
            w_gate.contiguous(),
            w_noise.contiguous() if noisy and w_noise is not None else None,
            noise.contiguous() if noisy and noise is not None else None,
            gates,
            expert_ids,
            grad_x if need_x else None,
            logits,
            spread,
            *sizes,
            K=slots,
            NOISY=noisy,
            **constants,
        )
        if rows >= MANY_ROWS:
            wide = x.to(gates.dtype)
            with torch.autocast(
                dispatch.autocast_device(x.device), enabled=False
            ):  # whoever calls backward() inside it
                if need_gate:
                    grad_gate.copy_(wide.T @ logits)
                if need_noise and spread is not None:
                    grad_noise.copy_(wide.T @ spread)
        elif need_gate or need_noise:
            weight_gradient_kernel[(triton.cdiv(width, depth_of(experts)),)](
                x,
                logits,
                spread,
                grad_gate if need_gate else None,
                grad_noise if need_noise else None,
                *sizes,
                **constants,
            )
    return grad_x, grad_gate, grad_noise

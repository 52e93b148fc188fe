"""Top-k gating in Triton: a block of rows per program, from router input to gates, expert ids and usage counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels.gating.reference import compute_dtype

BLOCK_B = 16
BLOCK_D = 32


@triton.jit
def _softplus(v):
    """``log(1 + exp(v))``, and ``v`` above 20 as PyTorch has it; accurate where ``1 + exp(v)`` loses digits."""
    t = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + t
    log_one_plus = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, log_one_plus)


@triton.jit
def gating_kernel(
    x_ptr,  # [B, D]
    w_gate_ptr,  # [D, E]
    w_noise_ptr,  # [D, E], read if NOISY
    noise_ptr,  # [B, E], read if NOISY
    gates_ptr,  # [B, K]
    expert_ids_ptr,  # [B, K] int64
    usage_ptr,  # [E] int64, zeros
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
    """Rows ``[BLOCK_B · program, …)``. Counts are integers, so adding them atomically gives the same sum in any order."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    columns = tl.arange(0, BLOCK_E)[None, :]  # [1, BLOCK_E]
    real_rows = rows[:, None] < B
    real = real_rows & (columns < E)
    logits = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    spread = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        x_offset = rows[:, None].to(tl.int64) * stride_xb + depth[None, :].to(tl.int64) * stride_xd
        x = tl.load(x_ptr + x_offset, mask=real_rows & (depth[None, :] < D), other=0.0).to(COMPUTE)
        w_offset = depth[:, None] * E + columns  # [BLOCK_D, BLOCK_E]
        w_mask = (depth[:, None] < D) & (columns < E)
        w = tl.load(w_gate_ptr + w_offset, mask=w_mask, other=0.0).to(COMPUTE)
        logits = tl.dot(x, w, logits, input_precision="ieee", out_dtype=COMPUTE)
        if NOISY:
            w = tl.load(w_noise_ptr + w_offset, mask=w_mask, other=0.0).to(COMPUTE)
            spread = tl.dot(x, w, spread, input_precision="ieee", out_dtype=COMPUTE)
    if NOISY:
        noise = tl.load(noise_ptr + rows[:, None].to(tl.int64) * E + columns, mask=real, other=0.0).to(COMPUTE)
        logits += noise * (_softplus(spread) + 0.01)

    key = tl.where(logits != logits, float("inf"), logits)  # NaN counts as the largest, as in a sort
    rank = tl.full((BLOCK_B, BLOCK_E), K, tl.int32)  # K: not chosen
    for j in range(K):
        free = (rank == K) & (columns < E)
        best = tl.max(tl.where(free, key, float("-inf")), 1)[:, None]
        first = tl.min(tl.where(free & (key == best), columns, BLOCK_E), 1)[:, None]  # of equal ones the lower id
        rank = tl.where(columns == first, j, rank)
    chosen = real & (rank < K)
    largest = tl.max(tl.where(columns < E, key, float("-inf")), 1)[:, None]
    weight = tl.where(rank < K, tl.exp(logits - largest), 0.0)
    gates = weight / tl.sum(weight, 1)[:, None]
    out = rows[:, None].to(tl.int64) * K + rank
    tl.store(gates_ptr + out, gates, mask=chosen)
    tl.store(expert_ids_ptr + out, tl.broadcast_to(columns, (BLOCK_B, BLOCK_E)).to(tl.int64), mask=chosen)
    counts = tl.sum(chosen.to(tl.int32), 0)  # [BLOCK_E]
    experts = tl.arange(0, BLOCK_E)
    tl.atomic_add(usage_ptr + experts, counts.to(tl.int64), mask=(experts < E) & (counts > 0), sem="relaxed")


def block_of(experts: int) -> int:
    """Columns of a program's tile: all experts, and at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(experts))


def top_k_gating(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cl_kernels.top_k_gating`."""
    (rows, width), experts, compute = x.shape, w_gate.shape[1], compute_dtype(x)
    gates = torch.empty(rows, k, dtype=compute, device=x.device)
    expert_ids = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    usage = torch.zeros(experts, dtype=torch.int64, device=x.device)
    if rows == 0:
        return gates, expert_ids, usage
    noisy = w_noise is not None and noise is not None
    if w_noise is not None and noise is not None:
        w_noise, noise = w_noise.contiguous(), noise.contiguous()
    with torch.cuda.device_of(x):
        gating_kernel[(triton.cdiv(rows, BLOCK_B),)](
            x,
            w_gate.contiguous(),
            w_noise if noisy else None,
            noise if noisy else None,
            gates,
            expert_ids,
            usage,
            rows,
            width,
            experts,
            x.stride(0),
            x.stride(1),
            K=k,
            NOISY=noisy,
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
            BLOCK_B=BLOCK_B,
            BLOCK_D=BLOCK_D,
            BLOCK_E=block_of(experts),
        )
    return gates, expert_ids, usage

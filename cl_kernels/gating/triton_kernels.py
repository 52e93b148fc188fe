"""Top-k gating in Triton, from router input to gates, expert ids and usage counts in one launch.

Small batches are one program, which needs no atomics; of larger ones every program has a block of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels.gating.reference import compute_dtype
from cl_kernels.gating.triton_tiles import BLOCK_B, block_of, depth_of, load_tile, operand_type, router_products

ROWS_ALONE = 128
"""So many rows at most are left to one program."""

EXPERTS_ALONE = 32
"""And so many experts: with more, the loop over blocks of rows spills on some targets."""

WORK_ALONE = {tl.float64: 2**20, tl.float32: 2**21, tl.float16: 2**22, tl.bfloat16: 2**22}
"""And so many multiplications, of padded tiles. On sm_90, 32 features of 64 rows and 32 experts with noise are 1,366 cycles of
instructions in fp32, of which 1,024 are the multiplications: a training step's 768 features would take one program 33 thousand
cycles, and four that share the rows 10 thousand each, which is worth more than the fill that they need. In 16 bits, on tensor
cores, it is 228: both wait for what they read, and the fill is saved."""

BLOCK_ALONE = 64
"""Rows of one program's tile at most: it reads the routers' weights once for all of them. On AMD, whose scalar registers hold the
masks of larger tiles only in part, and in fp64 it is ``BLOCK_B``."""

WARPS_ALONE = 8


@triton.jit
def _softplus(v):
    """``log(1 + exp(v))``, and ``v`` above 20 as PyTorch has it; accurate where ``1 + exp(v)`` loses digits."""
    t = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + t
    log_one_plus = tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, log_one_plus)


@triton.jit
def _gate_rows(
    first,  # of the block's rows
    x_ptr,
    w_gate_ptr,
    w_noise_ptr,
    noise_ptr,
    gates_ptr,
    expert_ids_ptr,
    B,
    D,
    E,
    stride_xb,
    stride_xd,
    K: tl.constexpr,
    NOISY: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Writes gates and expert ids of the rows ``[first, first + BLOCK_B)`` below B; returns how many chose each expert."""
    rows = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
    ids = tl.arange(0, BLOCK_E)
    columns = ids[None, :]
    real = (rows < B)[:, None] & (columns < E)
    logits, spread = router_products(
        rows, x_ptr, w_gate_ptr, w_noise_ptr, B, D, E, stride_xb, stride_xd,
        NOISY, OPERAND, COMPUTE, BLOCK_B, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    if NOISY:
        noise = load_tile(noise_ptr, rows, ids, E, 1, B, E, COMPUTE)
        logits += noise * (_softplus(spread) + 0.01)

    key = tl.where(logits != logits, float("inf"), logits)  # NaN counts as the largest, as in a sort
    rank = tl.full((BLOCK_B, BLOCK_E), K, tl.int32)  # K: not chosen
    for j in range(K):
        free = (rank == K) & (columns < E)
        best = tl.max(tl.where(free, key, float("-inf")), 1)[:, None]
        first_best = tl.min(tl.where(free & (key == best), columns, BLOCK_E), 1)[:, None]  # of equal ones the lower id
        rank = tl.where(columns == first_best, j, rank)
    chosen = real & (rank < K)
    largest = tl.max(tl.where(columns < E, key, float("-inf")), 1)[:, None]
    weight = tl.where(rank < K, tl.exp(logits - largest), 0.0)
    gates = weight / tl.sum(weight, 1)[:, None]
    out = rows[:, None] * K + rank
    tl.store(gates_ptr + out, gates, mask=chosen)
    tl.store(expert_ids_ptr + out, tl.broadcast_to(columns, (BLOCK_B, BLOCK_E)).to(tl.int64), mask=chosen)
    return tl.sum(chosen.to(tl.int32), 0)  # [BLOCK_E]


@triton.jit(do_not_specialize=["B"])
def gating_kernel(
    x_ptr,  # [B, D]
    w_gate_ptr,  # [D, E]
    w_noise_ptr,  # [D, E], read if NOISY
    noise_ptr,  # [B, E], read if NOISY
    gates_ptr,  # [B, K]
    expert_ids_ptr,  # [B, K] int64
    usage_ptr,  # [E] int64, zeros unless ALONE
    B,
    D,
    E,
    stride_xb,
    stride_xd,
    K: tl.constexpr,
    NOISY: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALONE: tl.constexpr,
):
    """A block of rows per program; ALONE: all of them, block after block, so that the counts of the one program are the result.

    Otherwise programs add their counts atomically: integers, whose sum is the same in any order.
    """
    columns = tl.arange(0, BLOCK_E)
    if ALONE:
        counts = tl.zeros((BLOCK_E,), tl.int32)
        for first in tl.range(0, B, BLOCK_B, disable_licm=True):
            counts += _gate_rows(
                first, x_ptr, w_gate_ptr, w_noise_ptr, noise_ptr, gates_ptr, expert_ids_ptr, B, D, E, stride_xb, stride_xd,
                K, NOISY, OPERAND, COMPUTE, BLOCK_B, BLOCK_D, BLOCK_E,
            )  # fmt: skip
        tl.store(usage_ptr + columns, counts.to(tl.int64), mask=columns < E)
    else:
        counts = _gate_rows(
            tl.program_id(0) * BLOCK_B, x_ptr, w_gate_ptr, w_noise_ptr, noise_ptr, gates_ptr, expert_ids_ptr, B, D, E,
            stride_xb, stride_xd, K, NOISY, OPERAND, COMPUTE, BLOCK_B, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        tl.atomic_add(usage_ptr + columns, counts.to(tl.int64), mask=(columns < E) & (counts > 0), sem="relaxed")


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched: ``alone`` as one program, which needs no atomics, or as one per ``block`` of rows."""

    alone: bool
    block: int
    warps: int


def launch_of(
    rows: int, width: int, experts: int, noisy: bool, operand: tl.dtype, amd: bool = torch.version.hip is not None
) -> Launch:
    """For (rows, width) router input, so many experts and products of ``operand``."""
    largest = BLOCK_B if amd or operand == tl.float64 else BLOCK_ALONE
    block = min(largest, max(BLOCK_B, triton.next_power_of_2(rows)))
    work = triton.cdiv(rows, block) * block * width * block_of(experts) * (1 + noisy)
    if rows <= ROWS_ALONE and experts <= EXPERTS_ALONE and work <= WORK_ALONE[operand]:
        return Launch(True, block, WARPS_ALONE)
    return Launch(False, BLOCK_B, 4 if experts < 64 else 8)


def top_k_gating(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cl_kernels.top_k_gating`."""
    (rows, width), experts, compute = x.shape, w_gate.shape[1], compute_dtype(x)
    noisy = w_noise is not None and noise is not None
    operand = operand_type(x, w_gate, w_noise if noisy else None)
    launch = launch_of(rows, width, experts, noisy, operand)
    gates = torch.empty(rows, k, dtype=compute, device=x.device)
    expert_ids = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    usage = (torch.empty if launch.alone and rows else torch.zeros)(experts, dtype=torch.int64, device=x.device)
    if rows == 0:
        return gates, expert_ids, usage
    if w_noise is not None and noise is not None:
        w_noise, noise = w_noise.contiguous(), noise.contiguous()
    with torch.cuda.device_of(x):
        gating_kernel[(1 if launch.alone else triton.cdiv(rows, launch.block),)](
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
            OPERAND=operand,
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
            BLOCK_B=launch.block,
            BLOCK_D=depth_of(experts),
            BLOCK_E=block_of(experts),
            ALONE=launch.alone,
            num_warps=launch.warps,
        )
    return gates, expert_ids, usage

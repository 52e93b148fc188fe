"""Launches the Triton kernels of the adapters: block sizes, grids and memory. Nothing here waits for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cl_kernels.moe_adapter import triton_kernels as kernels
from cl_kernels.moe_adapter.memory import empty_rows
from cl_kernels.moe_adapter.triton_routing import route

SHORT_SAMPLE = 4
"""Samples with fewer tokens are gathered into tiles by expert: tiles of their own would be nearly empty."""


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch options of one call, a function of dtype and shape alone."""

    rows: int
    columns: int  # of the bottleneck of all slots
    width: int  # of D
    padded_rank: int
    num_warps: int
    num_stages: int


def blocks_for(dtype: torch.dtype, length: int, width: int, rank: int, slots: int, gathered: bool) -> Blocks:
    """The forward and input-gradient tiles: chosen so that nothing spills and shared memory fits every target (tests/aot)."""
    padded_rank = max(16, triton.next_power_of_2(rank))
    half = dtype != torch.float32
    columns = min(128 if half else 64, padded_rank if gathered else triton.next_power_of_2(padded_rank * slots))
    # fp32 products without tensor cores take twice the registers, and gathered rows some more.
    if gathered:
        rows, step, wide = (64, 64, 4096) if half else (32, 16, 2048)
    else:
        rows = max(16, min(64, triton.next_power_of_2(length)))
        # Adding to what earlier launches wrote takes registers, too.
        step, wide = (64 if padded_rank * slots <= columns else 32, 8192) if half else (32, 4096)
    block_width = max(16, min(step, triton.next_power_of_2(width)))
    return Blocks(rows, columns, block_width, padded_rank, num_warps=8 if columns * rows >= wide else 4, num_stages=2)


def precision(x: Tensor) -> str:
    """fp32 products follow torch's own switch; 16-bit inputs are exact in any case."""
    fast = torch.get_float32_matmul_precision() != "highest" and x.is_cuda and torch.version.hip is None
    return "tf32" if fast else "ieee"


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Plan:
    """What forward and backward have in common for one call."""

    def __init__(self, x: Tensor, expert_ids: Tensor, rank: int, experts: int) -> None:
        self.batch, self.length, self.width = x.shape
        self.rank, self.experts, self.slots = rank, experts, expert_ids.shape[1]
        self.gathered = self.length < SHORT_SAMPLE
        self.blocks = blocks_for(x.dtype, self.length, self.width, rank, self.slots, self.gathered)
        rows = self.blocks.rows
        if self.gathered:
            # Every expert, and the rows without one, may leave one tile unfinished.
            self.grid: tuple[int, ...] = (triton.cdiv(self.batch * self.length, rows) + experts + 1,)
        else:
            self.grid = (triton.cdiv(self.length, rows), self.batch)
        self.first_columns = range(0, self.slots * self.blocks.padded_rank, self.blocks.columns)

    def constants(self, x: Tensor) -> dict[str, object]:
        b = self.blocks
        return {
            "D": self.width,
            "R": self.rank,
            "RP": b.padded_rank,
            "K": self.slots,
            "EP": triton.next_power_of_2(self.experts + 1),
            "GATHERED": self.gathered,
            "BLOCK_ROWS": b.rows,
            "BLOCK_C": b.columns,
            "BLOCK_D": b.width,
            "PRECISION": precision(x),
            "num_warps": b.num_warps,
            "num_stages": b.num_stages,
        }


def forward(
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
    """See :func:`cl_kernels.moe_adapter`; also the bottleneck (B, k, L, R)."""
    experts, rank, _ = down_weight.shape
    out = empty_rows(x)
    hidden = x.new_empty((x.shape[0], expert_ids.shape[1], x.shape[1], rank) if save_hidden else (0,))
    if out.numel() == 0:
        return out, hidden
    if expert_ids.shape[1] == 0:
        out.zero_() if residual is None else out.copy_(residual)
        return out, hidden
    x, expert_ids, gates = _unit_stride(x), expert_ids.contiguous(), gates.contiguous()
    residual = None if residual is None else _unit_stride(residual)
    plan = _Plan(x, expert_ids, rank, experts)
    with torch.cuda.device_of(x):
        order, offset = route(expert_ids, experts) if plan.gathered else (None, None)
        for first_column in plan.first_columns:
            kernels.forward_kernel[plan.grid](
                x,
                expert_ids,
                gates,
                down_weight.contiguous(),
                down_bias.contiguous(),
                up_weight.contiguous(),
                up_bias.contiguous(),
                residual,
                out,
                hidden if save_hidden else None,
                order,
                offset,
                0 if seed is None else int(seed),
                scale,
                dropout_p,
                plan.batch,
                plan.length,
                experts,
                first_column,
                *x.stride()[:2],
                *((0, 0) if residual is None else residual.stride()[:2]),
                *out.stride()[:2],
                OPENS=first_column == 0,
                DROPOUT=dropout_p > 0.0,
                **plan.constants(x),
            )
    return out, hidden


def backward(
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
    """Gradients of x, gates and the four weights; with zero elements where they are not needed."""
    experts, rank, width = down_weight.shape
    batch, slots = expert_ids.shape
    shapes = (experts, rank, width), (experts, rank), (experts, width, rank), (experts, width)
    weights = [x.new_empty(shape if need_experts else (0,)) for shape in shapes]
    grad_x = empty_rows(x) if need_x else x.new_empty(0)
    grad_gates = gates.new_empty(gates.shape if need_gates else (0,))
    if x.numel() == 0 or slots == 0:
        for empty in (grad_x, grad_gates, *weights):
            empty.zero_()
        return grad_x, grad_gates, *weights
    x, grad, expert_ids, gates = _unit_stride(x), _unit_stride(grad), expert_ids.contiguous(), gates.contiguous()
    plan = _Plan(x, expert_ids, rank, experts)
    chunks = max(1, plan.blocks.padded_rank // plan.blocks.columns)
    terms = plan.length if plan.gathered else plan.grid[0]
    gate_terms = gates.new_empty(batch, slots, chunks, terms) if need_gates else None
    grad_pre = torch.empty_like(hidden) if need_experts else None
    with torch.cuda.device_of(x):
        order, offset = route(expert_ids, experts) if plan.gathered or need_experts else (None, None)
        for first_column in plan.first_columns:
            kernels.input_gradient_kernel[plan.grid](
                grad,
                expert_ids,
                gates,
                down_weight.contiguous(),
                up_weight.contiguous(),
                up_bias.contiguous(),
                hidden,
                grad_x if need_x else None,
                gate_terms,
                grad_pre,
                order if plan.gathered else None,
                offset if plan.gathered else None,
                scale,
                1.0 / (1.0 - dropout_p),
                batch,
                plan.length,
                experts,
                terms,
                first_column,
                *grad.stride()[:2],
                *((0, 0) if not need_x else grad_x.stride()[:2]),
                OPENS=first_column == 0,
                **plan.constants(x),
            )
        if gate_terms is not None:
            torch.sum(gate_terms, dim=(2, 3), out=grad_gates)
        if grad_pre is not None and order is not None and offset is not None:
            _expert_gradients(plan, grad, x, gates, hidden, grad_pre, order, offset, weights, scale)
    return grad_x, grad_gates, *weights


def expert_blocks(dtype: torch.dtype, width: int, rank: int) -> dict[str, int]:
    """Block sizes and launch options of the expert gradients."""
    half = dtype != torch.float32
    return {
        "BLOCK_ROWS": 64 if half else 32,
        "BLOCK_R": max(16, min(64, triton.next_power_of_2(rank))),
        "BLOCK_D": max(16, min(64 if half else 32, triton.next_power_of_2(width))),
        "num_warps": 8,
        "num_stages": 2,
    }


def _expert_gradients(
    plan: _Plan,
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    hidden: Tensor,
    grad_pre: Tensor,
    order: Tensor,
    offset: Tensor,
    weights: list[Tensor],
    scale: float,
) -> None:
    blocks = expert_blocks(x.dtype, plan.width, plan.rank)
    grid = (
        plan.experts,
        triton.cdiv(plan.width, blocks["BLOCK_D"]),
        max(1, math.ceil(plan.rank / blocks["BLOCK_R"])),
    )
    kernels.expert_gradient_kernel[grid](
        grad,
        x,
        gates,
        hidden,
        grad_pre,
        order,
        offset,
        *weights,
        scale,
        plan.batch,
        plan.length,
        plan.experts,
        *grad.stride()[:2],
        *x.stride()[:2],
        D=plan.width,
        R=plan.rank,
        K=plan.slots,
        PRECISION=precision(x),
        **blocks,
    )

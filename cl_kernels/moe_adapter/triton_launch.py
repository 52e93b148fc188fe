"""Launches the Triton kernels of the adapters: grids and memory. Nothing here waits for the device or depends on what it holds.

A forward pass is one launch; a backward pass is the gradient of x, the sorting of samples by expert, the experts' gradients, and
their last sums. Tokens that are routed one by one take one launch per slot for the first two, and are sorted before.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cl_kernels.moe_adapter.memory import empty_rows
from cl_kernels.moe_adapter.triton_backward import input_gradient_kernel
from cl_kernels.moe_adapter.triton_blocks import blocks_for, chunk_rows, expert_blocks, shared_memory
from cl_kernels.moe_adapter.triton_experts import expert_gradient_kernel, finish_kernel
from cl_kernels.moe_adapter.triton_forward import forward_kernel
from cl_kernels.moe_adapter.triton_routing import route
from cl_kernels.precision import float32_products

SHORT_SAMPLE = 4
"""Samples with fewer tokens are gathered into tiles by expert: tiles of their own would be nearly empty."""

BLOCK_SUMS, BLOCK_GATES = 1024, 64
"""Elements of the experts' gradients and gates that a program of the last sums takes."""


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Plan:
    """What forward and backward have in common for one call."""

    def __init__(self, x: Tensor, expert_ids: Tensor, rank: int, experts: int) -> None:
        self.batch, self.length, self.width = x.shape
        self.rank, self.experts, self.slots = rank, experts, expert_ids.shape[1]
        self.gathered = self.length < SHORT_SAMPLE
        shape = (self.batch, self.length, self.width)
        self.blocks = blocks_for(x.dtype, shape, rank, self.slots, experts, self.gathered, shared_memory(x.device))
        rows = self.blocks.rows
        if self.gathered:
            # Every expert, and the rows without one, may leave one tile unfinished.
            self.grid: tuple[int, ...] = (triton.cdiv(self.batch * self.length, rows) + experts + 1,)
        else:
            self.grid = (self.batch, triton.cdiv(self.length, rows))
        self.launches = self.slots if self.gathered else 1

    def constants(self, x: Tensor) -> dict[str, object]:
        """Compile-time arguments and launch options of the row kernels."""
        b = self.blocks
        return {
            "D": self.width,
            "R": self.rank,
            "RP": b.padded_rank,
            "K": self.slots,
            "EP": triton.next_power_of_2(self.experts + 1),
            "CHUNKS": b.chunks,
            "GATHERED": self.gathered,
            "BLOCK_ROWS": b.rows,
            "BLOCK_C": b.columns,
            "BLOCK_D": b.width,
            "PRECISION": float32_products(x.device),
            "STAGES": b.out_stages,
            "num_warps": b.num_warps,
            "num_stages": b.num_stages,
        }

    def partial(self, out: Tensor) -> Tensor | None:
        """Where the launches but the last add up: in ``out`` itself where that rounds no more than once."""
        if self.launches == 1:
            return None
        return out if self.launches == 2 or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


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
    bottleneck = (x.shape[0], expert_ids.shape[1], x.shape[1], rank)
    hidden = x.new_empty(bottleneck if save_hidden else (0,))
    if out.numel() == 0:
        return out, hidden
    if expert_ids.shape[1] == 0:
        out.zero_() if residual is None else out.copy_(residual)
        return out, hidden
    x, expert_ids, gates = _unit_stride(x), expert_ids.contiguous(), gates.contiguous()
    residual = None if residual is None else _unit_stride(residual)
    plan = _Plan(x, expert_ids, rank, experts)
    written = hidden if save_hidden else x.new_empty(bottleneck) if plan.blocks.chunks > 1 else None
    partial, seed = plan.partial(out), None if seed is None else seed.to(x.device)
    with torch.cuda.device_of(x):
        order, offset = route(expert_ids, experts) if plan.gathered else (None, None)
        for slot in range(plan.launches):
            forward_kernel[plan.grid](
                x,
                expert_ids,
                gates,
                down_weight.contiguous(),
                down_bias.contiguous(),
                up_weight.contiguous(),
                up_bias.contiguous(),
                residual,
                partial,
                out,
                written,
                order,
                offset,
                seed,
                scale,
                dropout_p,
                plan.batch,
                plan.length,
                experts,
                slot,
                *x.stride()[:2],
                *((0, 0) if residual is None else residual.stride()[:2]),
                *out.stride()[:2],
                KP=triton.next_power_of_2(plan.slots),
                FIRST=slot == 0,
                LAST=slot == plan.launches - 1,
                DROPOUT=dropout_p > 0.0,
                SHIFTED=seed is not None and seed.dim() > 0,
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
    parts = max(1, plan.blocks.padded_rank // plan.blocks.columns)
    terms = parts * plan.length if plan.gathered else (parts + 1) * triton.cdiv(plan.length, plan.blocks.rows)
    gate_terms = gates.new_empty(batch, slots, terms) if need_gates else None
    grad_pre = torch.empty_like(hidden) if need_experts or plan.blocks.chunks > 1 else None
    partial = plan.partial(grad_x) if need_x else None
    with torch.cuda.device_of(x):
        order, offset = route(expert_ids, experts) if plan.gathered or need_experts else (None, None)
        for slot in range(plan.launches):
            input_gradient_kernel[plan.grid](
                grad,
                expert_ids,
                gates,
                down_weight.contiguous(),
                up_weight.contiguous(),
                up_bias.contiguous(),
                hidden,
                partial,
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
                slot,
                *grad.stride()[:2],
                *((0, 0) if not need_x else grad_x.stride()[:2]),
                FIRST=slot == 0,
                LAST=slot == plan.launches - 1,
                **plan.constants(x),
            )
        sums, chunk = None, 0
        if need_experts:
            sums, chunk = _expert_gradients(plan, grad, x, gates, hidden, grad_pre, order, offset, weights, scale)
        if need_gates or need_experts:
            _finish(plan, sums, chunk, offset, weights, gate_terms, grad_gates)
    return grad_x, grad_gates, *weights


def _expert_gradients(
    plan: _Plan,
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    hidden: Tensor,
    grad_pre: Tensor | None,
    order: Tensor | None,
    offset: Tensor | None,
    weights: list[Tensor],
    scale: float,
) -> tuple[Tensor, int]:
    """Sums over the chunks of every expert's rows: where they are, and how many rows a chunk has."""
    blocks = expert_blocks(x.dtype, plan.width, plan.rank, shared_memory(x.device))
    pieces = triton.cdiv(plan.width, blocks["BLOCK_D"]) * triton.cdiv(plan.rank, blocks["BLOCK_R"])
    rows = plan.batch * plan.slots * plan.length
    chunk = chunk_rows(rows, pieces, blocks["BLOCK_ROWS"])
    # A chunk that is not its expert's only one holds more than half of chunk_rows on average.
    kept = 2 * triton.cdiv(rows, chunk) if rows > chunk else 0
    sums = x.new_empty((kept, sum(w[0].numel() for w in weights)), dtype=torch.float32)
    grid = (pieces, triton.cdiv(rows, chunk) + min(plan.experts, plan.batch * plan.slots))
    expert_gradient_kernel[grid](
        grad,
        x,
        gates,
        hidden,
        grad_pre,
        order,
        offset,
        *weights,
        sums,
        scale,
        plan.batch,
        plan.length,
        plan.experts,
        chunk,
        *grad.stride()[:2],
        *x.stride()[:2],
        D=plan.width,
        R=plan.rank,
        K=plan.slots,
        EP=triton.next_power_of_2(plan.experts + 1),
        PRECISION=float32_products(x.device),
        **blocks,
    )
    return sums, chunk


def _finish(
    plan: _Plan,
    sums: Tensor | None,
    chunk: int,
    offset: Tensor | None,
    weights: list[Tensor],
    gate_terms: Tensor | None,
    grad_gates: Tensor,
) -> None:
    """Adds up what the kernels before left in parts: the experts' gradients if there are ``sums``, the gates' if ``gate_terms``."""
    gates = 0 if gate_terms is None else grad_gates.numel()
    terms = 1 if gate_terms is None else gate_terms.shape[-1]
    width = 0 if sums is None else sums.shape[1]
    grid = (max(1, triton.cdiv(width, BLOCK_SUMS) if width else triton.cdiv(gates, BLOCK_GATES)), plan.experts + 1)
    finish_kernel[grid if width else (grid[0], 1)](
        sums,
        offset,
        *weights,
        gate_terms,
        grad_gates,
        gates,
        plan.length,
        plan.experts,
        chunk,
        D=plan.width,
        R=plan.rank,
        K=plan.slots,
        EP=triton.next_power_of_2(plan.experts + 1),
        TERMS=terms,
        TERMS_PADDED=min(64, triton.next_power_of_2(terms)),
        BLOCK=BLOCK_SUMS,
        BLOCK_GATES=BLOCK_GATES,
    )

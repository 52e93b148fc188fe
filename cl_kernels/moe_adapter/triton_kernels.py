"""Triton kernels of the adapters: forward, gradients of x and gates, gradients of the experts.

All slots of a sample together are one bottleneck of k · R columns, each column with the weights of its slot's expert. A program
holds ``BLOCK_C`` of them in registers for a tile of tokens; what does not fit is added by further launches over the same tiles.
Tokens that are routed one by one are gathered into tiles of one expert (``GATHERED``), slot after slot: a launch visits a row once,
so that nothing needs atomics. Expert ids out of range read no weights and contribute nothing.

Shapes: x (B, L, D) in any memory order with unit stride along D; R padded to ``RP``, a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gathered_rows(
    order_ptr,  # [B]: samples by expert, for this slot
    offset_ptr,  # [E + 2]: where each expert's samples begin
    L,
    E,
    EP: tl.constexpr,  # power of two > E
    BLOCK_ROWS: tl.constexpr,
):
    """Sample, token and mask of this program's rows, and the expert they share: E without one, more than E without rows."""
    bucket = tl.arange(0, EP)
    begin = tl.load(offset_ptr + bucket, mask=bucket <= E, other=0)
    end = tl.load(offset_ptr + bucket + 1, mask=bucket <= E, other=0)
    tiles = ((end - begin) * L + BLOCK_ROWS - 1) // BLOCK_ROWS
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tl.program_id(0)).to(tl.int32), 0)
    mine = bucket == expert
    first = tl.program_id(0) - tl.sum(tl.where(mine, last - tiles, 0), 0)
    start = tl.sum(tl.where(mine, begin, 0), 0)
    row = first * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = row < tl.sum(tl.where(mine, end - begin, 0), 0) * L
    sample = tl.load(order_ptr + start + row // L, mask=mask, other=0).to(tl.int64)
    return sample, (row % L).to(tl.int64), mask, expert


@triton.jit
def _contract(
    row_ptr,  # [BLOCK_ROWS]: pointers to the rows of a (·, D) matrix
    row_mask,
    column_ptr,  # [BLOCK_C]: pointers to the columns of the (D, ·) weights
    column_mask,
    stride,  # along D
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """rows · columns over D, fp32 [BLOCK_ROWS, BLOCK_C]."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        rows = tl.load(row_ptr[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
        columns = tl.load(
            column_ptr[None, :] + d[:, None] * stride, mask=(d < D)[:, None] & column_mask[None, :], other=0.0
        )
        total = tl.dot(rows, columns, total, input_precision=PRECISION)
    return total


@triton.jit
def forward_kernel(
    x_ptr,  # [B, L, D]
    ids_ptr,  # [B, K]
    gates_ptr,  # [B, K]
    down_weight_ptr,  # [E, R, D]
    down_bias_ptr,  # [E, R]
    up_weight_ptr,  # [E, D, R]
    up_bias_ptr,  # [E, D]
    residual_ptr,  # [B, L, D] or None
    out_ptr,  # [B, L, D]
    hidden_ptr,  # [B, K, L, R] or None
    order_ptr,  # [K, B] or None
    offset_ptr,  # [K, E + 2] or None
    seed,
    scale,
    dropout_p,
    B,
    L,
    E,
    first_column,  # of this launch, in [0, K · RP)
    x_stride_b,
    x_stride_l,
    residual_stride_b,
    residual_stride_l,
    out_stride_b,
    out_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    GATHERED: tl.constexpr,
    OPENS: tl.constexpr,  # the first launch: starts from the residual instead of what is there
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (+)= [residual +] Σ over this launch's columns of gate · scale · dropout(relu(x W_downᵀ + b_down)) W_upᵀ, and b_up."""
    column = first_column + tl.arange(0, BLOCK_C)
    slot, r = column // RP, column % RP
    if GATHERED:
        j = first_column // RP
        sample, token, row_mask, shared = _gathered_rows(
            order_ptr + j * B, offset_ptr + j * (E + 2), L, E, EP, BLOCK_ROWS
        )
        if shared > E:
            return
        expert = tl.zeros((BLOCK_C,), tl.int64) + shared
        gate = tl.load(gates_ptr + sample * K + j, mask=row_mask, other=0.0)[:, None] * scale
    else:
        b = tl.program_id(1).to(tl.int64)
        sample = tl.zeros((BLOCK_ROWS,), tl.int64) + b
        token = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = token < L
        expert = tl.load(ids_ptr + b * K + slot, mask=slot < K, other=-1)
        gate = tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
    column_mask = (r < R) & (slot < K) & (expert >= 0) & (expert < E)
    expert = tl.where(column_mask, expert, 0)

    x_rows = x_ptr + sample * x_stride_b + token * x_stride_l
    h = _contract(
        x_rows,
        row_mask,
        down_weight_ptr + (expert * R + r) * D,
        column_mask,
        1,
        D,
        BLOCK_ROWS,
        BLOCK_C,
        BLOCK_D,
        PRECISION,
    )
    h += tl.load(down_bias_ptr + expert * R + r, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    h = tl.where(h < 0.0, 0.0, h)  # NaN passes
    saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
    if DROPOUT:
        groups: tl.constexpr = (R + 3) // 4
        counter = (sample * K * L + token)[:, None] * groups + (slot.to(tl.int64) * L * groups + r // 4)[None, :]
        zero = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
        low, high = tl.where((r % 2 == 0)[None, :], w0, w1), tl.where((r % 2 == 0)[None, :], w2, w3)
        word = tl.where((r % 4 < 2)[None, :], low, high)
        h = tl.where(tl.uint_to_uniform_float(word) >= dropout_p, h / (1.0 - dropout_p), 0.0)
    if hidden_ptr is not None:
        in_hidden = row_mask[:, None] & ((r < R) & (slot < K))[None, :]
        tl.store(hidden_ptr + saved, h.to(hidden_ptr.dtype.element_ty), mask=in_hidden)
    h = (h * gate).to(x_ptr.dtype.element_ty)

    out_rows = out_ptr + sample * out_stride_b + token * out_stride_l
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = row_mask[:, None] & (d < D)[None, :]
        weight = tl.load(
            up_weight_ptr + (expert * D * R + r)[:, None] + d[None, :] * R,
            mask=column_mask[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total = tl.dot(h, weight, input_precision=PRECISION)
        if GATHERED:
            if first_column % RP == 0:
                bias = tl.load(up_bias_ptr + shared * D + d, mask=(d < D) & (shared < E), other=0.0)
                total += gate * bias.to(tl.float32)[None, :]
        elif OPENS:
            for j in tl.static_range(K):
                e = tl.load(ids_ptr + b * K + j)
                valid = (e >= 0) & (e < E)
                bias = tl.load(up_bias_ptr + e * D + d, mask=(d < D) & valid, other=0.0).to(tl.float32)
                total += (tl.load(gates_ptr + b * K + j) * scale * bias)[None, :]
        if not OPENS:
            total += tl.load(out_rows[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        elif residual_ptr is not None:
            rows = residual_ptr + sample * residual_stride_b + token * residual_stride_l
            total += tl.load(rows[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows[:, None] + d[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def input_gradient_kernel(
    grad_ptr,  # [B, L, D]
    ids_ptr,  # [B, K]
    gates_ptr,  # [B, K]
    down_weight_ptr,  # [E, R, D]
    up_weight_ptr,  # [E, D, R]
    up_bias_ptr,  # [E, D]
    hidden_ptr,  # [B, K, L, R]
    grad_x_ptr,  # [B, L, D] or None
    gate_terms_ptr,  # [B, K, chunks, terms] or None: terms of the gate gradient by tile, or by token where GATHERED
    grad_pre_ptr,  # [B, K, L, R] or None: gradient before the ReLU
    order_ptr,  # [K, B] or None
    offset_ptr,  # [K, E + 2] or None
    scale,
    grown,  # 1 / (1 − dropout_p)
    B,
    L,
    E,
    terms,
    first_column,
    grad_stride_b,
    grad_stride_l,
    grad_x_stride_b,
    grad_x_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    GATHERED: tl.constexpr,
    OPENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g = grad W_up; gate terms scale · (g · hidden + grad · b_up); grad_pre = gate · scale · grown · g where hidden > 0;
    grad_x (+)= grad_pre W_down.
    """
    SLOTS: tl.constexpr = BLOCK_C // RP if BLOCK_C > RP else 1  # slots of one launch, and the launches of one slot
    CHUNKS: tl.constexpr = RP // BLOCK_C if RP > BLOCK_C else 1
    column = first_column + tl.arange(0, BLOCK_C)
    slot, r = column // RP, column % RP
    first_slot, chunk = first_column // RP, first_column % RP // BLOCK_C
    if GATHERED:
        sample, token, row_mask, shared = _gathered_rows(
            order_ptr + first_slot * B, offset_ptr + first_slot * (E + 2), L, E, EP, BLOCK_ROWS
        )
        if shared > E:
            return
        expert = tl.zeros((BLOCK_C,), tl.int64) + shared
        gate = tl.load(gates_ptr + sample * K + first_slot, mask=row_mask, other=0.0)[:, None] * scale
    else:
        b = tl.program_id(1).to(tl.int64)
        sample = tl.zeros((BLOCK_ROWS,), tl.int64) + b
        token = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = token < L
        expert = tl.load(ids_ptr + b * K + slot, mask=slot < K, other=-1)
        gate = tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
    column_mask = (r < R) & (slot < K) & (expert >= 0) & (expert < E)
    expert = tl.where(column_mask, expert, 0)

    grad_rows = grad_ptr + sample * grad_stride_b + token * grad_stride_l
    g = _contract(
        grad_rows,
        row_mask,
        up_weight_ptr + expert * D * R + r,
        column_mask,
        R,
        D,
        BLOCK_ROWS,
        BLOCK_C,
        BLOCK_D,
        PRECISION,
    )
    saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
    inside = row_mask[:, None] & column_mask[None, :]
    h = tl.load(hidden_ptr + saved, mask=inside, other=0.0).to(tl.float32)
    if gate_terms_ptr is not None:
        if GATHERED:
            term = tl.sum(g * h, 1)
            if chunk == 0:
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    rows = tl.load(
                        grad_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0
                    )
                    bias = tl.load(up_bias_ptr + shared * D + d, mask=(d < D) & (shared < E), other=0.0)
                    term += tl.sum(rows.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
            where = ((sample * K + first_slot) * CHUNKS + chunk) * terms + token
            tl.store(gate_terms_ptr + where, scale * term, mask=row_mask)
        else:
            term = tl.sum(tl.reshape(tl.sum(g * h, 0), (SLOTS, BLOCK_C // SLOTS)), 1)
            slots = first_slot + tl.arange(0, SLOTS)
            experts = tl.load(ids_ptr + b * K + slots, mask=slots < K, other=-1)
            chosen = (experts >= 0) & (experts < E)
            if chunk == 0:
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    rows = tl.load(
                        grad_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0
                    )
                    bias = tl.load(
                        up_bias_ptr + experts[:, None] * D + d[None, :],
                        mask=chosen[:, None] & (d < D)[None, :],
                        other=0.0,
                    )
                    term += tl.sum(bias.to(tl.float32) * tl.sum(rows.to(tl.float32), 0)[None, :], 1)
            where = ((b * K + slots) * CHUNKS + chunk) * terms + tl.program_id(0)
            tl.store(gate_terms_ptr + where, scale * term, mask=slots < K)

    pre = tl.where((h <= 0.0) | (column_mask[None, :] == 0), 0.0, g * gate * grown).to(grad_ptr.dtype.element_ty)
    if grad_pre_ptr is not None:
        tl.store(grad_pre_ptr + saved, pre, mask=inside)
    if grad_x_ptr is not None:
        out_rows = grad_x_ptr + sample * grad_x_stride_b + token * grad_x_stride_l
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            weight = tl.load(
                down_weight_ptr + ((expert * R + r) * D)[:, None] + d[None, :],
                mask=column_mask[:, None] & (d < D)[None, :],
                other=0.0,
            )
            total = tl.dot(pre, weight, input_precision=PRECISION)
            within = row_mask[:, None] & (d < D)[None, :]
            if not OPENS:
                total += tl.load(out_rows[:, None] + d[None, :], mask=within, other=0.0).to(tl.float32)
            tl.store(out_rows[:, None] + d[None, :], total.to(grad_x_ptr.dtype.element_ty), mask=within)


@triton.jit
def expert_gradient_kernel(
    grad_ptr,  # [B, L, D]
    x_ptr,  # [B, L, D]
    gates_ptr,  # [B, K]
    hidden_ptr,  # [B, K, L, R]
    grad_pre_ptr,  # [B, K, L, R]
    order_ptr,  # [K, B]: samples by expert, for every slot
    offset_ptr,  # [K, E + 2]
    grad_down_weight_ptr,  # [E, R, D]
    grad_down_bias_ptr,  # [E, R]
    grad_up_weight_ptr,  # [E, D, R]
    grad_up_bias_ptr,  # [E, D]
    scale,
    B,
    L,
    E,
    grad_stride_b,
    grad_stride_l,
    x_stride_b,
    x_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_R, BLOCK_D) block of one expert's weight gradients, over the tokens that chose it, slot by slot in order."""
    expert = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_mask, r_mask = d < D, r < R
    down = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    down_bias = tl.zeros((BLOCK_R,), tl.float32)
    up_bias = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        begin = tl.load(offset_ptr + j * (E + 2) + expert)
        total = (tl.load(offset_ptr + j * (E + 2) + expert + 1) - begin) * L
        for start in range(0, total, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            mask = row < total
            sample = tl.load(order_ptr + j * B + begin + row // L, mask=mask, other=0).to(tl.int64)
            token = (row % L).to(tl.int64)
            gate = tl.load(gates_ptr + sample * K + j, mask=mask, other=0.0) * scale
            in_rows = mask[:, None] & d_mask[None, :]
            x = tl.load(
                x_ptr + (sample * x_stride_b + token * x_stride_l)[:, None] + d[None, :], mask=in_rows, other=0.0
            )
            grad = tl.load(
                grad_ptr + (sample * grad_stride_b + token * grad_stride_l)[:, None] + d[None, :],
                mask=in_rows,
                other=0.0,
            )
            saved = (((sample * K + j) * L + token) * R)[None, :] + r[:, None]
            in_saved = r_mask[:, None] & mask[None, :]
            h = tl.load(hidden_ptr + saved, mask=in_saved, other=0.0)
            pre = tl.load(grad_pre_ptr + saved, mask=in_saved, other=0.0)
            down = tl.dot(pre, x, down, input_precision=PRECISION)
            up = tl.dot((h.to(tl.float32) * gate[None, :]).to(grad.dtype), grad, up, input_precision=PRECISION)
            down_bias += tl.sum(pre.to(tl.float32), 1)
            up_bias += tl.sum(grad.to(tl.float32) * gate[:, None], 0)
    block = r_mask[:, None] & d_mask[None, :]
    dtype = grad_down_weight_ptr.dtype.element_ty
    tl.store(grad_down_weight_ptr + ((expert * R + r) * D)[:, None] + d[None, :], down.to(dtype), mask=block)
    tl.store(grad_up_weight_ptr + expert * D * R + d[None, :] * R + r[:, None], up.to(dtype), mask=block)
    if tl.program_id(1) == 0:
        tl.store(grad_down_bias_ptr + expert * R + r, down_bias.to(dtype), mask=r_mask)
    if tl.program_id(2) == 0:
        tl.store(grad_up_bias_ptr + expert * D + d, up_bias.to(dtype), mask=d_mask)

"""Triton kernel of the adapters' gradients of x and of the gates."""

from __future__ import annotations

import triton
import triton.language as tl

from cl_kernels.moe_adapter.triton_tiles import columns, gathered_rows, tile_of_sample


@triton.jit
def _before_relu(
    grad_rows,  # [BLOCK_ROWS]: pointers
    row_mask,
    sample,
    token,
    slot,  # [BLOCK_C], like the next three
    r,
    expert,
    column_mask,
    gate,  # [BLOCK_ROWS, 1] or [1, BLOCK_C], times scale
    ids_ptr,
    up_weight_ptr,
    up_bias_ptr,
    hidden_ptr,
    gate_terms_ptr,
    grad_pre_ptr,
    b,
    shared,
    first_slot,
    first_column,
    scale,
    grown,
    L,
    E,
    terms,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient before the ReLU [BLOCK_ROWS, BLOCK_C] in the dtype of grad; its copy in memory, and terms of the gate gradient."""
    SLOTS: tl.constexpr = BLOCK_C // RP if BLOCK_C > RP else 1  # slots of these columns, and their parts of one slot
    PARTS: tl.constexpr = RP // BLOCK_C if RP > BLOCK_C else 1
    part = first_column % RP // BLOCK_C
    # The products of grad with the slots' b_up, which the gates need, are further columns of the product with W_up.
    wide = tl.arange(0, 16)
    wide_slot = first_slot + first_column // RP + wide
    if GATHERED:
        biased = (wide == 0) & (shared < E) & (part == 0)
        wide_expert = tl.zeros((16,), tl.int64) + shared
    else:
        wide_expert = tl.load(ids_ptr + b * K + wide_slot, mask=(wide < SLOTS) & (wide_slot < K), other=-1)
        biased = (wide_expert >= 0) & (wide_expert < E) & (part == 0)
    bias_columns = up_bias_ptr + tl.where(biased, wide_expert, 0) * D

    g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    along_bias = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        rows = tl.load(grad_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
        weight = tl.load(
            up_weight_ptr + (expert * D * R + r)[None, :] + d[:, None] * R,
            mask=(d < D)[:, None] & column_mask[None, :],
            other=0.0,
        )
        g = tl.dot(rows, weight, g, input_precision=PRECISION)
        if gate_terms_ptr is not None:
            bias = tl.load(bias_columns[None, :] + d[:, None], mask=(d < D)[:, None] & biased[None, :], other=0.0)
            along_bias = tl.dot(rows, bias, along_bias, input_precision=PRECISION)

    saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
    inside = row_mask[:, None] & column_mask[None, :]
    h = tl.load(hidden_ptr + saved, mask=inside, other=0.0).to(tl.float32)
    if gate_terms_ptr is not None:
        if GATHERED:
            where = ((sample * K + first_slot) * PARTS + part) * L + token
            tl.store(gate_terms_ptr + where, scale * (tl.sum(g * h, 1) + tl.sum(along_bias, 1)), mask=row_mask)
        else:
            slots = first_slot + first_column // RP + tl.arange(0, SLOTS)
            _, tile, tiles = tile_of_sample()
            term = tl.sum(tl.reshape(tl.sum(g * h, 0), (SLOTS, BLOCK_C // SLOTS)), 1)
            where = (b * K + slots) * terms + part * tiles + tile
            tl.store(gate_terms_ptr + where, scale * term, mask=slots < K)
            where = (b * K + wide_slot) * terms + PARTS * tiles + tile
            own = (wide < SLOTS) & (wide_slot < K) & (part == 0)
            tl.store(gate_terms_ptr + where, scale * tl.sum(along_bias, 0), mask=own)
    pre = tl.where((h <= 0.0) | (column_mask[None, :] == 0), 0.0, g * gate * grown).to(grad_rows.dtype.element_ty)
    if grad_pre_ptr is not None:
        tl.store(grad_pre_ptr + saved, pre, mask=inside)
    return pre


@triton.jit(do_not_specialize=["B", "L", "E", "terms", "first_slot"])
def input_gradient_kernel(
    grad_ptr,  # [B, L, D]
    ids_ptr,  # [B, K]
    gates_ptr,  # [B, K]
    down_weight_ptr,  # [E, R, D]
    up_weight_ptr,  # [E, D, R]
    up_bias_ptr,  # [E, D]
    hidden_ptr,  # [B, K, L, R]
    partial_ptr,  # [B, L, D] with the strides of grad_x: sum of the launches for earlier slots; None if there is one launch
    grad_x_ptr,  # [B, L, D] or None
    gate_terms_ptr,  # [B, K, terms] or None: what the gates' gradients are the sums of
    grad_pre_ptr,  # [B, K, L, R]: gradient before the ReLU; None only where nobody needs it and CHUNKS is 1
    order_ptr,  # [K, B] or None
    offset_ptr,  # [K, E + 2] or None
    scale,
    grown,  # 1 / (1 − dropout_p)
    B,
    L,
    E,
    terms,
    first_slot,
    grad_stride_b,
    grad_stride_l,
    grad_x_stride_b,
    grad_x_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    CHUNKS: tl.constexpr,
    GATHERED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """g = grad W_up; gate terms scale · (g · hidden + grad · b_up); grad_pre = gate · scale · grown · g where hidden > 0;
    grad_x = Σ over all columns of grad_pre W_down.
    """
    if GATHERED:
        b = 0
        sample, token, row_mask, shared = gathered_rows(
            order_ptr + tl.cast(first_slot, tl.int64) * B, offset_ptr + first_slot * (E + 2), L, E, EP, BLOCK_ROWS
        )
        if shared > E:
            return
        gate = tl.load(gates_ptr + sample * K + first_slot, mask=row_mask, other=0.0)[:, None] * scale
    else:
        b, tile, _ = tile_of_sample()
        b = b.to(tl.int64)
        shared = 0
        sample = tl.zeros((BLOCK_ROWS,), tl.int64) + b
        token = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = token < L
    grad_rows = grad_ptr + sample * grad_stride_b + token * grad_stride_l
    out_rows = (sample * grad_x_stride_b + token * grad_x_stride_l)[:, None]

    if CHUNKS == 1:
        slot, r, expert, column_mask = columns(ids_ptr, b, shared, first_slot, 0, E, R, RP, K, GATHERED, BLOCK_C)
        if not GATHERED:
            gate = tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
        pre = _before_relu(
            grad_rows, row_mask, sample, token, slot, r, expert, column_mask, gate, ids_ptr, up_weight_ptr, up_bias_ptr,
            hidden_ptr, gate_terms_ptr, grad_pre_ptr, b, shared, first_slot, 0, scale, grown, L, E, terms,
            D, R, RP, K, GATHERED, BLOCK_ROWS, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        for c in range(0, CHUNKS * BLOCK_C, BLOCK_C):
            slot, r, expert, column_mask = columns(ids_ptr, b, shared, first_slot, c, E, R, RP, K, GATHERED, BLOCK_C)
            if not GATHERED:
                gate = tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
            _before_relu(
                grad_rows, row_mask, sample, token, slot, r, expert, column_mask, gate, ids_ptr, up_weight_ptr,
                up_bias_ptr, hidden_ptr, gate_terms_ptr, grad_pre_ptr, b, shared, first_slot, c, scale, grown, L, E, terms,
                D, R, RP, K, GATHERED, BLOCK_ROWS, BLOCK_C, BLOCK_D, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # threads read below what others wrote above

    if grad_x_ptr is not None:
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            d_mask = (d < D)[None, :]
            inside = row_mask[:, None] & d_mask
            if CHUNKS == 1:
                weight = tl.load(
                    down_weight_ptr + ((expert * R + r) * D)[:, None] + d[None, :],
                    mask=column_mask[:, None] & d_mask,
                    other=0.0,
                )
                total = tl.dot(pre, weight, input_precision=PRECISION)
            else:
                total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
                for c in range(0, CHUNKS * BLOCK_C, BLOCK_C):
                    slot, r, expert, column_mask = columns(
                        ids_ptr, b, shared, first_slot, c, E, R, RP, K, GATHERED, BLOCK_C
                    )
                    saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
                    pre = tl.load(grad_pre_ptr + saved, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
                    weight = tl.load(
                        down_weight_ptr + ((expert * R + r) * D)[:, None] + d[None, :],
                        mask=column_mask[:, None] & d_mask,
                        other=0.0,
                    )
                    total = tl.dot(pre, weight, total, input_precision=PRECISION)
            if not FIRST:
                total += tl.load(partial_ptr + out_rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if LAST:
                tl.store(grad_x_ptr + out_rows + d[None, :], total.to(grad_x_ptr.dtype.element_ty), mask=inside)
            else:
                tl.store(partial_ptr + out_rows + d[None, :], total.to(partial_ptr.dtype.element_ty), mask=inside)

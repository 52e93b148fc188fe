"""Triton kernel of the adapters' forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from cl_kernels.moe_adapter.triton_tiles import columns, contract, gathered_rows, kept, tile_of_sample


@triton.jit
def _bottleneck(
    x_rows,  # [BLOCK_ROWS]: pointers
    row_mask,
    sample,
    token,
    slot,  # [BLOCK_C], like the next three
    r,
    expert,
    column_mask,
    down_weight_ptr,
    down_bias_ptr,
    hidden_ptr,
    seed,
    first_sample,
    dropout_p,
    first_slot,
    first_column,
    L,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dropout(relu(x W_downᵀ + b_down)), fp32 [BLOCK_ROWS, BLOCK_C]; also written to ``hidden_ptr`` unless that is None."""
    weight = down_weight_ptr + (expert * R + r) * D
    h = contract(x_rows, row_mask, weight, column_mask, 1, D, BLOCK_ROWS, BLOCK_C, BLOCK_D, PRECISION)
    h += tl.load(down_bias_ptr + expert * R + r, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    h = tl.where(h < 0.0, 0.0, h)  # NaN passes
    if DROPOUT:
        keep = kept(
            seed, dropout_p, first_sample + sample, token, first_slot, first_column, L, R, RP, K, BLOCK_ROWS, BLOCK_C
        )
        h = tl.where(keep != 0, h / (1.0 - dropout_p), 0.0)
    if hidden_ptr is not None:
        saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
        inside = row_mask[:, None] & ((r < R) & (slot < K))[None, :]
        tl.store(hidden_ptr + saved, h.to(hidden_ptr.dtype.element_ty), mask=inside)
    return h


@triton.jit(do_not_specialize=["B", "L", "E", "first_slot"])
def forward_kernel(
    x_ptr,  # [B, L, D]
    ids_ptr,  # [B, K]
    gates_ptr,  # [B, K]
    down_weight_ptr,  # [E, R, D]
    down_bias_ptr,  # [E, R]
    up_weight_ptr,  # [E, D, R]
    up_bias_ptr,  # [E, D]
    residual_ptr,  # [B, L, D] or None
    partial_ptr,  # [B, L, D] with the strides of out: sum of the launches for earlier slots; None if there is one launch
    out_ptr,  # [B, L, D]
    hidden_ptr,  # [B, K, L, R], None only where nobody needs it and CHUNKS is 1
    order_ptr,  # [K, B] or None
    offset_ptr,  # [K, E + 2] or None
    seed_ptr,  # [] int64, with SHIFTED [2], read if DROPOUT: in memory, so that a captured graph finds a new one in every replay
    scale,
    dropout_p,
    B,
    L,
    E,
    first_slot,  # of this launch, 0 unless GATHERED
    x_stride_b,
    x_stride_l,
    residual_stride_b,
    residual_stride_l,
    out_stride_b,
    out_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,  # power of two >= R
    K: tl.constexpr,
    KP: tl.constexpr,  # power of two >= K
    EP: tl.constexpr,  # power of two > E
    CHUNKS: tl.constexpr,  # of BLOCK_C columns
    GATHERED: tl.constexpr,
    FIRST: tl.constexpr,  # no launch came before this one
    LAST: tl.constexpr,  # none comes after it
    DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    SHIFTED: tl.constexpr = False,  # sample 0 is number seed_ptr[1] of the batch that the counters of dropout run through
):
    """residual + Σ over all columns of gate · scale · dropout(relu(x W_downᵀ + b_down)) W_upᵀ, and b_up.

    The sum is in fp32 and rounded once; of several launches (GATHERED) the last adds the residual.
    """
    seed = 0
    first_sample = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
        if SHIFTED:
            first_sample = tl.load(seed_ptr + 1)
    if GATHERED:
        b = 0
        sample, token, row_mask, shared = gathered_rows(
            order_ptr + tl.cast(first_slot, tl.int64) * B, offset_ptr + first_slot * (E + 2), L, E, EP, BLOCK_ROWS
        )
        if shared > E:
            return
        row_gate = tl.load(gates_ptr + sample * K + first_slot, mask=row_mask, other=0.0)[:, None] * scale
    else:
        b, tile, _ = tile_of_sample()
        b = b.to(tl.int64)
        shared = 0
        sample = tl.zeros((BLOCK_ROWS,), tl.int64) + b
        token = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        row_mask = token < L
        slots = tl.arange(0, KP)
        experts = tl.load(ids_ptr + b * K + slots, mask=slots < K, other=-1)
        chosen = (experts >= 0) & (experts < E)
        slot_gate = tl.load(gates_ptr + b * K + slots, mask=chosen, other=0.0)[:, None] * scale
        slot_bias = up_bias_ptr + tl.where(chosen, experts, 0)[:, None] * D
    x_rows = x_ptr + sample * x_stride_b + token * x_stride_l
    out_rows = (sample * out_stride_b + token * out_stride_l)[:, None]

    # Columns that fit the registers stay there. More of them go through memory, so that one launch still writes out once.
    if CHUNKS == 1:
        slot, r, expert, column_mask = columns(ids_ptr, b, shared, first_slot, 0, E, R, RP, K, GATHERED, BLOCK_C)
        h = _bottleneck(
            x_rows, row_mask, sample, token, slot, r, expert, column_mask, down_weight_ptr, down_bias_ptr, hidden_ptr,
            seed, first_sample, dropout_p, first_slot, 0, L, D, R, RP, K, DROPOUT, BLOCK_ROWS, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        if GATHERED:
            h *= row_gate
        else:
            h *= tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
        weighted = h.to(x_ptr.dtype.element_ty)
    else:
        for c in range(0, CHUNKS * BLOCK_C, BLOCK_C):
            slot, r, expert, column_mask = columns(ids_ptr, b, shared, first_slot, c, E, R, RP, K, GATHERED, BLOCK_C)
            _bottleneck(
                x_rows, row_mask, sample, token, slot, r, expert, column_mask, down_weight_ptr, down_bias_ptr, hidden_ptr,
                seed, first_sample, dropout_p, first_slot, c, L, D, R, RP, K, DROPOUT, BLOCK_ROWS, BLOCK_C, BLOCK_D, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # threads read below what others wrote above

    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = (d < D)[None, :]
        inside = row_mask[:, None] & d_mask
        if CHUNKS == 1:
            weight = tl.load(
                up_weight_ptr + (expert * D * R + r)[:, None] + d[None, :] * R,
                mask=column_mask[:, None] & d_mask,
                other=0.0,
            )
            total = tl.dot(weighted, weight, input_precision=PRECISION)
        else:
            total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
            for c in range(0, CHUNKS * BLOCK_C, BLOCK_C):
                slot, r, expert, column_mask = columns(
                    ids_ptr, b, shared, first_slot, c, E, R, RP, K, GATHERED, BLOCK_C
                )
                saved = (sample * K * L + token)[:, None] * R + (slot.to(tl.int64) * L * R + r)[None, :]
                h = tl.load(hidden_ptr + saved, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
                weight = tl.load(
                    up_weight_ptr + (expert * D * R + r)[:, None] + d[None, :] * R,
                    mask=column_mask[:, None] & d_mask,
                    other=0.0,
                )
                if GATHERED:
                    h = h.to(tl.float32) * row_gate
                else:
                    h = h.to(tl.float32) * (
                        tl.load(gates_ptr + b * K + slot, mask=slot < K, other=0.0)[None, :] * scale
                    )
                total = tl.dot(h.to(x_ptr.dtype.element_ty), weight, total, input_precision=PRECISION)
        if GATHERED:
            bias = tl.load(up_bias_ptr + tl.cast(shared, tl.int64) * D + d, mask=(d < D) & (shared < E), other=0.0)
            total += row_gate * bias.to(tl.float32)[None, :]
        else:
            bias = tl.load(slot_bias + d[None, :], mask=chosen[:, None] & d_mask, other=0.0).to(tl.float32)
            total += tl.sum(slot_gate * bias, 0)[None, :]
        if not FIRST:
            total += tl.load(partial_ptr + out_rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if LAST:
            if residual_ptr is not None:
                rows = (sample * residual_stride_b + token * residual_stride_l)[:, None] + d[None, :]
                total += tl.load(residual_ptr + rows, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + out_rows + d[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(partial_ptr + out_rows + d[None, :], total.to(partial_ptr.dtype.element_ty), mask=inside)

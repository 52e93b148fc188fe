"""Triton kernels of the experts' gradients: sums over the tokens of each expert, split so that one busy expert fills a GPU.

The rows of an expert, slot after slot, are cut into chunks of a fixed length. Each chunk is summed by programs of its own. An
expert of one chunk is finished by them; of more, a second kernel adds the chunks' sums in their order: no atomics, the same bits
every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunks(offset_ptr, L, E, chunk_rows, K: tl.constexpr, EP: tl.constexpr):
    """Rows of each expert, their number of chunks, and the number of its sums that are kept for adding up, int32 [EP]."""
    bucket = tl.arange(0, EP)
    samples = tl.zeros((EP,), tl.int32)
    for j in range(K):
        at = offset_ptr + j * (E + 2) + bucket
        samples += tl.load(at + 1, mask=bucket < E, other=0) - tl.load(at, mask=bucket < E, other=0)
    rows = samples * L
    chunks = (rows + chunk_rows - 1) // chunk_rows
    return rows, chunks, tl.where(chunks > 1, chunks, 0)


@triton.jit(do_not_specialize=["B", "L", "E", "chunk_rows"])
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
    sums_ptr,  # [sums, 2 · R · D + R + D] fp32: the four gradients, of chunks that are not their expert's only one
    scale,
    B,
    L,
    E,
    chunk_rows,
    grad_stride_b,
    grad_stride_l,
    x_stride_b,
    x_stride_l,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_R, BLOCK_D) block of the weight gradients, summed over one chunk of one expert's rows."""
    rows, chunks, kept = _chunks(offset_ptr, L, E, chunk_rows, K, EP)
    last = tl.cumsum(chunks, 0)
    expert = tl.sum((last <= tl.program_id(1)).to(tl.int32), 0)
    if expert >= E:
        return
    bucket = tl.arange(0, EP)
    mine = bucket == expert
    only = tl.sum(tl.where(mine, chunks, 0), 0) == 1
    index = tl.program_id(1) - tl.sum(tl.where(mine, last - chunks, 0), 0)
    place = tl.sum(tl.where(bucket < expert, kept, 0), 0) + index
    first = index * chunk_rows
    end = tl.minimum(first + chunk_rows, tl.sum(tl.where(mine, rows, 0), 0))

    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    d_mask, r_mask = d < D, r < R
    down = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    down_bias = tl.zeros((BLOCK_R,), tl.float32)
    up_bias = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        begin = tl.load(offset_ptr + j * (E + 2) + expert)
        total = (tl.load(offset_ptr + j * (E + 2) + expert + 1) - begin) * L
        begin += tl.cast(j, tl.int64) * B
        start, stop = tl.maximum(first, 0), tl.minimum(end, total)
        # The samples of a tile are read one tile ahead: loads that waited for loads could not be overlapped with products.
        row = start + tl.arange(0, BLOCK_ROWS)
        next_sample = tl.load(order_ptr + begin + row // L, mask=row < stop, other=0)
        for _ in range(start, stop, BLOCK_ROWS):
            mask, sample, token = row < stop, next_sample.to(tl.int64), (row % L).to(tl.int64)
            row += BLOCK_ROWS
            next_sample = tl.load(order_ptr + begin + row // L, mask=row < stop, other=0)
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
        first -= total  # the next slot's rows follow this one's
        end -= total

    block = r_mask[:, None] & d_mask[None, :]
    down_mask, up_mask = r_mask & (tl.program_id(0) % blocks == 0), d_mask & (tl.program_id(0) // blocks == 0)
    if only:
        dtype = grad_down_weight_ptr.dtype.element_ty
        e = expert.to(tl.int64)
        tl.store(grad_down_weight_ptr + ((e * R + r) * D)[:, None] + d[None, :], down.to(dtype), mask=block)
        tl.store(grad_up_weight_ptr + e * D * R + d[None, :] * R + r[:, None], up.to(dtype), mask=block)
        tl.store(grad_down_bias_ptr + e * R + r, down_bias.to(dtype), mask=down_mask)
        tl.store(grad_up_bias_ptr + e * D + d, up_bias.to(dtype), mask=up_mask)
    else:
        sums_ptr += place.to(tl.int64) * (2 * R * D + R + D)
        tl.store(sums_ptr + (r * D)[:, None] + d[None, :], down, mask=block)
        tl.store(sums_ptr + R * D + d[None, :] * R + r[:, None], up, mask=block)
        tl.store(sums_ptr + 2 * R * D + r, down_bias, mask=down_mask)
        tl.store(sums_ptr + 2 * R * D + R + d, up_bias, mask=up_mask)


@triton.jit(do_not_specialize=["gates", "L", "E", "chunk_rows"])
def finish_kernel(
    sums_ptr,  # [sums, 2 · R · D + R + D] fp32, or None without experts' gradients
    offset_ptr,  # [K, E + 2]
    grad_down_weight_ptr,  # [E, R, D]
    grad_down_bias_ptr,  # [E, R]
    grad_up_weight_ptr,  # [E, D, R]
    grad_up_bias_ptr,  # [E, D]
    gate_terms_ptr,  # [gates, TERMS] or None
    grad_gates_ptr,  # [gates]
    gates,
    L,
    E,
    chunk_rows,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    EP: tl.constexpr,
    TERMS: tl.constexpr,
    TERMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
):
    """Adds up the chunks' sums of one block of one expert, zeros if it has none; the last row of programs adds up gate terms."""
    if tl.program_id(1) == tl.num_programs(1) - 1:
        if gate_terms_ptr is not None:
            for start in range(tl.program_id(0) * BLOCK_GATES, gates, tl.num_programs(0) * BLOCK_GATES):
                gate = start + tl.arange(0, BLOCK_GATES).to(tl.int64)
                total = tl.zeros((BLOCK_GATES,), tl.float32)
                for first in range(0, TERMS, TERMS_PADDED):
                    term = first + tl.arange(0, TERMS_PADDED)
                    mask = (gate < gates)[:, None] & (term < TERMS)[None, :]
                    total += tl.sum(
                        tl.load(gate_terms_ptr + gate[:, None] * TERMS + term[None, :], mask=mask, other=0.0), 1
                    )
                tl.store(grad_gates_ptr + gate, total, mask=gate < gates)
        return
    if sums_ptr is not None:
        WIDTH: tl.constexpr = 2 * R * D + R + D
        _, chunks, kept = _chunks(offset_ptr, L, E, chunk_rows, K, EP)
        bucket = tl.arange(0, EP)
        expert = tl.program_id(1)
        count = tl.sum(tl.where(bucket == expert, chunks, 0), 0)
        if count == 1:
            return
        place = tl.sum(tl.where(bucket < expert, kept, 0), 0)
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for n in range(count):
            total += tl.load(sums_ptr + (place + n).to(tl.int64) * WIDTH + i, mask=i < WIDTH, other=0.0)
        total = total.to(grad_down_weight_ptr.dtype.element_ty)
        expert = expert.to(tl.int64)
        tl.store(grad_down_weight_ptr + expert * R * D + i, total, mask=i < R * D)
        i -= R * D
        tl.store(grad_up_weight_ptr + expert * R * D + i, total, mask=(i >= 0) & (i < R * D))
        i -= R * D
        tl.store(grad_down_bias_ptr + expert * R + i, total, mask=(i >= 0) & (i < R))
        i -= R
        tl.store(grad_up_bias_ptr + expert * D + i, total, mask=(i >= 0) & (i < D))

"""What the adapters' Triton kernels share: which rows and columns a program holds, products along D, the dropout mask.

All slots of a sample together are one bottleneck of k · R columns, each column with the weights of its slot's expert. A program
holds a tile of tokens of one sample, and goes through the columns ``BLOCK_C`` at a time. Tokens that are routed one by one are
gathered into tiles of one expert (``GATHERED``), slot after slot: a launch visits a row once, so that nothing needs atomics.
Expert ids out of range read no weights and contribute nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gathered_rows(
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
def tile_of_sample():
    """This program's sample, its tile of that sample's tokens, and how many tiles each has.

    Samples lie along the grid's first dimension: the others end at 65,535 programs, which batches do not. Numbers of both in one
    dimension would have to be divided, which costs registers that these kernels do not have.
    """
    return tl.program_id(0), tl.program_id(1), tl.num_programs(1)


@triton.jit
def columns(
    ids_ptr,  # [B, K]
    b,  # the sample that all rows share, unless GATHERED
    shared,  # the expert that all rows share, if GATHERED
    first_slot,
    first_column,
    E,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    GATHERED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Slot, index in the bottleneck, expert and mask of the columns from ``first_column`` of slot ``first_slot`` on."""
    column = first_column + tl.arange(0, BLOCK_C)
    slot, r = first_slot + column // RP, column % RP
    expert = tl.zeros((BLOCK_C,), tl.int64) + shared
    if not GATHERED:
        expert = tl.load(ids_ptr + b * K + slot, mask=slot < K, other=-1)
    mask = (r < R) & (slot < K) & (expert >= 0) & (expert < E)
    return slot, r, tl.where(mask, expert, 0), mask


@triton.jit
def contract(
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
        weight = tl.load(
            column_ptr[None, :] + d[:, None] * stride, mask=(d < D)[:, None] & column_mask[None, :], other=0.0
        )
        total = tl.dot(rows, weight, total, input_precision=PRECISION)
    return total


@triton.jit
def kept(
    seed,
    dropout_p,
    sample,  # [BLOCK_ROWS]
    token,  # [BLOCK_ROWS]
    first_slot,
    first_column,
    L,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Which elements dropout keeps, int8 [BLOCK_ROWS, BLOCK_C]. A counter yields the words of four columns: one draw for four."""
    QUADS: tl.constexpr = (R + 3) // 4
    column = first_column + 4 * tl.arange(0, BLOCK_C // 4)
    slot, quad = first_slot + column // RP, column % RP // 4
    counter = (sample * K * L + token)[:, None] * QUADS + (slot.to(tl.int64) * L * QUADS + quad)[None, :]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_C // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    k0 = (tl.uint_to_uniform_float(w0) >= dropout_p).to(tl.int8)
    k1 = (tl.uint_to_uniform_float(w1) >= dropout_p).to(tl.int8)
    k2 = (tl.uint_to_uniform_float(w2) >= dropout_p).to(tl.int8)
    k3 = (tl.uint_to_uniform_float(w3) >= dropout_p).to(tl.int8)
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (BLOCK_ROWS, BLOCK_C))

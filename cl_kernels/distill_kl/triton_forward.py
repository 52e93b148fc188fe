"""Distillation from features in Triton, forward: tiles of the similarity matrix that never leave the processor.

A program takes some blocks of rows and a group of columns. Of each tile it takes the sums along both directions: those along the
columns stay in registers for all columns of the group, those along the rows are merged into a slot that only this program touches.
A second kernel, in ``triton_merge``, merges the groups and the slots in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cl_kernels.distill_kl.triton_merge import STATS, join_statistics, load_statistics, store_statistics
from cl_kernels.distill_kl.triton_tiles import OUTSIDE, level_of, student_and_teacher


@triton.jit
def _shared_level(
    z_s, z_t, top_s, top_t, weight, at, m_real,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile from one level and one exponential for both directions: returns rows', stores columns' at ``at``.

    Tiles are changed in place, and every sum leaves before the next tile of exponentials appears: registers are short.
    """
    zero = tl.zeros((at.shape[0],), tl.float32)
    z_s -= top_s
    z_t -= top_t
    e = tl.exp2(z_t)
    sum_t = tl.sum(e, 1)
    if COLUMNS:
        mass = tl.sum(e, 0)
        tl.store(at + 2, zero + top_t, mask=m_real)
        tl.store(at + 3, mass, mask=m_real)
        if WEIGHTED:
            mass = tl.sum(e * weight[:, None], 0)
        tl.store(at + 4, mass, mask=m_real)
    e *= z_s - z_t if KL else z_s
    cross = tl.sum(e, 1)
    if COLUMNS:
        if WEIGHTED:
            e *= weight[:, None]
        tl.store(at + 5, tl.sum(e, 0), mask=m_real)
    e = tl.exp2(z_s)
    sum_s = tl.sum(e, 1)
    if COLUMNS:
        tl.store(at, zero + top_s, mask=m_real)
        tl.store(at + 1, tl.sum(e, 0), mask=m_real)
    return sum_s, sum_t, cross


@triton.jit
def _own_levels(z_s, z_t, weight, AXIS: tl.constexpr, WEIGHTED: tl.constexpr, KL: tl.constexpr):
    """Statistics along ``AXIS``, each row or column from its own largest entry."""
    level_s, level_t = tl.max(z_s, AXIS), tl.max(z_t, AXIS)
    z_s -= tl.expand_dims(level_s, AXIS)
    z_t -= tl.expand_dims(level_t, AXIS)
    e = tl.exp2(z_t)
    sum_s, sum_t = tl.sum(tl.exp2(z_s), AXIS), tl.sum(e, AXIS)
    if KL:
        z_s -= z_t
    mass = sum_t
    if WEIGHTED:
        e *= weight[:, None]
        mass = tl.sum(e, AXIS)
    return level_s, sum_s, level_t, sum_t, mass, tl.sum(e * z_s, AXIS)


@triton.jit
def _wide_tile(
    z_s, z_t, weight, tiles, at, columns, diagonal, masked,
    MASK_DIAGONAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, KL: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics of a tile whose entries lie too far apart to share a level, or holds part of a masked diagonal.

    The tile goes through memory, WIDTH columns at once: registers taken here count even where no tile ever comes this way.
    """
    BLOCK_N: tl.constexpr = z_s.shape[0]
    BLOCK_M: tl.constexpr = z_s.shape[1]
    i = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M
    tl.store(tiles + i + tl.arange(0, BLOCK_M)[None, :], z_s)
    tl.store(tiles + BLOCK_N * BLOCK_M + i + tl.arange(0, BLOCK_M)[None, :], z_t)
    tl.debug_barrier()
    level_s = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
    level_t = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_t = tl.zeros((BLOCK_N,), tl.float32)
    cross = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, BLOCK_M, WIDTH):
        j = start + tl.arange(0, WIDTH)
        part_s = tl.load(tiles + i + j[None, :])
        part_t = tl.load(tiles + BLOCK_N * BLOCK_M + i + j[None, :])
        if MASK_DIAGONAL:
            on_diagonal = (diagonal + tl.arange(0, BLOCK_N))[:, None] == j[None, :]
            part_s, part_t = tl.where(on_diagonal, masked, part_s), tl.where(on_diagonal, masked, part_t)
        if ROWS:
            level_s, sum_s, level_t, sum_t, _, cross = join_statistics(
                level_s, sum_s, level_t, sum_t, sum_t, cross, *_own_levels(part_s, part_t, weight, 1, False, KL), KL
            )
        if COLUMNS:
            store_statistics(at + j * STATS, j < columns, *_own_levels(part_s, part_t, weight, 0, WEIGHTED, KL))
    tl.debug_barrier()
    return level_s, sum_s, level_t, sum_t, cross


@triton.jit(do_not_specialize=["N", "M", "group"])
def forward_kernel(
    student_ptr,  # [N, D]
    teacher_ptr,  # [K, N, D_T]
    anchors_ptr,  # [M, D]
    teacher_anchors_ptr,  # [M, D_T], unused if SHARED
    weight_ptr,  # [K, N] or None
    scale_ptr,  # [] or None
    row_parts_ptr,  # [column groups, K, N, STATS]
    column_parts_ptr,  # [row slots, K, M, STATS]
    notes_ptr,  # [programs, BLOCK_M, STATS]
    tiles_ptr,  # [programs, 2, BLOCK_N, BLOCK_M]: see _wide_tile
    finished_ptr,  # [] int32: set to 0 for the merge kernel
    N,
    M,
    D,
    D_T,
    group,  # columns of a group, a multiple of BLOCK_M
    scale,
    masked,
    K: tl.constexpr,
    KL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MASK_DIAGONAL: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row slots, column groups, K)."""
    slot, k = tl.program_id(0), tl.program_id(2).to(tl.int64)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + slot
    if program == 0:
        tl.store(finished_ptr, 0)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    teacher_ptr += k * N * D_T
    column_parts_ptr += (slot.to(tl.int64) * K + k) * M * STATS
    note = notes_ptr + program * (BLOCK_M * STATS)
    tiles = tiles_ptr + program.to(tl.int64) * (2 * BLOCK_N * BLOCK_M)
    WEIGHTED: tl.constexpr = weight_ptr is not None
    j = tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * group
    for row in range(slot * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        n = row + tl.arange(0, BLOCK_N)
        n_real = n < N
        weight = n_real.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + k * N + n, mask=n_real, other=0.0)
        level_s = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
        level_t = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
        sum_s = tl.zeros((BLOCK_N,), tl.float32)
        sum_t = tl.zeros((BLOCK_N,), tl.float32)
        cross = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.range(begin, tl.minimum(begin + group, M), BLOCK_M, disable_licm=True):
            m_real = start + j < M
            z_s, z_t = student_and_teacher(
                student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, row, N - row, start, M - start, D, D_T,
                scale, SHARED, EVEN, EVEN_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            top_s, near_s = level_of(z_s)
            top_t, near_t = level_of(z_t)
            # Added, not selected: a mask per entry takes more scalar registers than AMD's processors have.
            outside = tl.where(n_real, 0.0, OUTSIDE)[:, None] + tl.where(m_real, 0.0, OUTSIDE)[None, :]
            z_s += outside
            z_t += outside
            near = near_s & near_t
            if MASK_DIAGONAL:
                near = near & ((row >= start + BLOCK_M) | (start >= row + BLOCK_N))
            # A slot that holds other rows already: the statistics of the tile go into a note first.
            again = row > slot * BLOCK_N
            slots = column_parts_ptr + tl.cast(start, tl.int64) * STATS
            at = note if again else slots
            r_level_s = tl.zeros((BLOCK_N,), tl.float32) + top_s
            r_level_t = tl.zeros((BLOCK_N,), tl.float32) + top_t
            if near:
                r_sum_s, r_sum_t, r_cross = _shared_level(
                    z_s, z_t, top_s, top_t, weight, at + j * STATS, m_real, ROWS, COLUMNS, WEIGHTED, KL
                )
            else:
                r_level_s, r_sum_s, r_level_t, r_sum_t, r_cross = _wide_tile(
                    z_s, z_t, weight, tiles, at, M - start, row - start, masked, MASK_DIAGONAL, ROWS, COLUMNS, WEIGHTED, KL, 16
                )  # fmt: skip
            if COLUMNS & again:
                # Loaded again they lie one to a thread; added to directly, every thread would hold a quarter of the columns.
                tl.debug_barrier()
                old = load_statistics(slots + j * STATS, m_real)
                store_statistics(
                    slots + j * STATS, m_real, *join_statistics(*old, *load_statistics(note + j * STATS, m_real), KL)
                )
                tl.debug_barrier()
            if ROWS:
                level_s, sum_s, level_t, sum_t, _, cross = join_statistics(
                    level_s, sum_s, level_t, sum_t, sum_t, cross,
                    r_level_s, r_sum_s, r_level_t, r_sum_t, r_sum_t, r_cross, KL,
                )  # fmt: skip
        if ROWS:
            part = row_parts_ptr + ((tl.program_id(1).to(tl.int64) * K + k) * N + row) * STATS
            at = part + tl.arange(0, BLOCK_N) * STATS
            store_statistics(at, n_real, level_s, sum_s, level_t, sum_t, weight * sum_t, weight * cross)

"""Tiles of the similarity matrix in Triton: what the forward and the backward pass from features share.

``z = logits / temperature · log2(e)``, so that every exponential is one instruction. Entries outside the matrix are ``OUTSIDE``.
"""

from __future__ import annotations

import triton
import triton.language as tl

OUTSIDE = tl.constexpr(-1e30)  # z where there is no entry: far below every other, and finite
SPREAD = tl.constexpr(60.0)
"""Largest range of z in a tile whose exponentials may all be taken from one level: 2^-60 and its sums are far from underflow."""


@triton.jit
def load_block(
    ptr, row, left, column, D, EVEN: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[ROWS, BLOCK_D] of a row-major matrix with D columns, from (row, column) on, of which ``left`` rows exist.

    Rows that do not exist repeat the last one, so that no load needs a mask for them; what comes of them is never used. Columns
    that do not exist are 0 if ``MASKED``, which one factor of a product has to be, and repeat the last one otherwise.
    One 64-bit address and 32-bit offsets from it: whole tiles of 64-bit addresses would take most of the registers.
    """
    r = tl.minimum(tl.arange(0, ROWS), left - 1)
    d = tl.arange(0, BLOCK_D)
    base = ptr + (tl.cast(row, tl.int64) * D + column)
    if EVEN:
        return tl.load(base + (r[:, None] * D + d[None, :]))
    if MASKED:
        return tl.load(base + (r[:, None] * D + d[None, :]), mask=(column + d < D)[None, :], other=0.0)
    return tl.load(base + (r[:, None] * D + tl.minimum(d, D - 1 - column)[None, :]))


@triton.jit
def product(
    f_ptr, a_ptr, row, n_left, column, m_left, D,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """f aᵀ [BLOCK_N, BLOCK_M] in fp32, of the rows from ``row`` and the anchors from ``column`` on."""
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        f = load_block(f_ptr, row, n_left, start, D, EVEN, True, BLOCK_N, BLOCK_D)
        a = load_block(a_ptr, column, m_left, start, D, EVEN, False, BLOCK_M, BLOCK_D)
        z = tl.dot(f, tl.trans(a), z, input_precision=PRECISION)
    return z


@triton.jit
def student_and_teacher(
    student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, row, n_left, column, m_left, D, D_T, scale,
    SHARED: tl.constexpr, EVEN: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z of the student and of one teacher on a tile, [BLOCK_N, BLOCK_M] each, reading shared anchors once."""
    if SHARED:
        z_s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        z_t = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, D, BLOCK_D):
            a = tl.trans(load_block(anchors_ptr, column, m_left, start, D, EVEN, True, BLOCK_M, BLOCK_D))
            s = load_block(student_ptr, row, n_left, start, D, EVEN, False, BLOCK_N, BLOCK_D)
            t = load_block(teacher_ptr, row, n_left, start, D, EVEN, False, BLOCK_N, BLOCK_D)
            z_s = tl.dot(s, a, z_s, input_precision=PRECISION)
            z_t = tl.dot(t, a, z_t, input_precision=PRECISION)
    else:
        z_s = product(
            student_ptr, anchors_ptr, row, n_left, column, m_left, D, EVEN, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D
        )
        z_t = product(
            teacher_ptr,
            teacher_anchors_ptr,
            row,
            n_left,
            column,
            m_left,
            D_T,
            EVEN_T,
            PRECISION,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
        )
    return z_s * scale, z_t * scale


@triton.jit
def level_of(z):
    """(level, near): the largest entry of a tile, and whether every other one is near enough to share it as a level.

    ``z`` as multiplied, where rows and columns outside the matrix still repeat its last ones.
    """
    level = tl.max(z)
    return level, level - tl.min(z) < SPREAD

"""Distillation from features in Triton, backward: the gradient of the logits in bounded pieces, and products with them.

``gradient_kernel`` computes tiles of the logits once more and writes their gradient, for as many columns as fit a scratch of fixed
size; ``product_kernel`` multiplies that with the anchors or the student's features. Holding the gradient of the features beside the
tile instead would either need more registers than there are, or compute every tile once per part of d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cl_kernels.distill_kl.triton_merge import add_up
from cl_kernels.distill_kl.triton_tiles import (
    level_of,
    load_block,
    product,
    student_and_teacher,
)


@triton.jit
def _probabilities(
    g, z, level, near, n, n_real, m, m_real, row_lse_ptr, column_lse_ptr, row_weight, column_weight,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g + row_weight · softmax over columns [BLOCK_N, 1] + column_weight · softmax over rows; weights broadcast to the tile.

    Both are 2^(z - level) times something that depends on the row or on the column alone, wherever the range of z allows it. What
    comes of entries outside the matrix and of a masked diagonal may be anything.
    """
    row_lse = tl.zeros((n.shape[0],), tl.float32)
    column_lse = tl.zeros((m.shape[0],), tl.float32)
    if ROWS:
        row_lse = tl.load(row_lse_ptr + n, mask=n_real, other=0.0)
    if COLUMNS:
        column_lse = tl.load(column_lse_ptr + m, mask=m_real, other=0.0)
    if near:
        factor = row_weight * tl.exp2(level - row_lse)[:, None]
        if COLUMNS:
            factor = column_weight * tl.exp2(level - column_lse)[None, :] + (factor if ROWS else 0.0)
        g += tl.exp2(z - level) * factor
    else:
        if ROWS:
            g += row_weight * tl.exp2(z - row_lse[:, None])
        if COLUMNS:
            g += column_weight * tl.exp2(z - column_lse[None, :])
    return g


@triton.jit(do_not_specialize=["N", "M", "first"])
def gradient_kernel(
    student_ptr,  # [N, D]
    teacher_ptr,  # [K, N, D_T]
    anchors_ptr,  # [M, D]
    teacher_anchors_ptr,  # [M, D_T], unused if SHARED
    weight_ptr,  # [K, N] or None
    scale_ptr,  # [] or None
    row_stats_ptr,  # [1 + K, N]
    column_stats_ptr,  # [2 + K, M]
    out_ptr,  # [N, width]: gradient of the student's logits, columns first … first + width - 1
    finished_ptr,  # [] int32: set to 0 for the finishing kernel
    N,
    M,
    D,
    D_T,
    first,
    width,
    scale,
    row_factor,
    column_factor,
    K: tl.constexpr,
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
    """Grid (row blocks, blocks of columns). Writes 0 outside the matrix and on a masked diagonal."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(finished_ptr, 0)
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    n_real = n < N
    column = first + tl.program_id(1) * BLOCK_M
    m = column + tl.arange(0, BLOCK_M)
    m_real = m < M
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if weight_ptr is not None:
        for k in tl.static_range(K):
            total += tl.load(weight_ptr + k * N + n, mask=n_real, other=0.0)
    else:
        total += K
    mass = tl.load(column_stats_ptr + M + m, mask=m_real & COLUMNS, other=0.0)[None, :]
    g = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    z_s, z_t = student_and_teacher(
        student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, row, N - row, column, M - column, D, D_T, scale,
        SHARED, EVEN, EVEN_T, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    level, near = level_of(z_s)
    g = _probabilities(
        g, z_s, level, near, n, n_real, m, m_real, row_stats_ptr, column_stats_ptr, row_factor * total[:, None],
        column_factor * mass, ROWS, COLUMNS,
    )  # fmt: skip
    for k in tl.static_range(K):
        if k > 0:
            own = anchors_ptr if SHARED else teacher_anchors_ptr
            z_t = scale * product(
                teacher_ptr + tl.cast(k, tl.int64) * N * D_T, own, row, N - row, column, M - column, D_T, EVEN_T, PRECISION,
                BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        level, near = level_of(z_t)
        weight = n_real.to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + k * N + n, mask=n_real, other=0.0)
        g = _probabilities(
            g, z_t, level, near, n, n_real, m, m_real, row_stats_ptr + (1 + k) * N, column_stats_ptr + (2 + k) * M,
            -row_factor * weight[:, None], -column_factor * weight[:, None], ROWS, COLUMNS,
        )  # fmt: skip
    inside = n_real[:, None] & m_real[None, :]
    if MASK_DIAGONAL:
        inside = inside & (n[:, None] != m[None, :])
    g = tl.where(inside, g, 0.0)
    at = out_ptr + (tl.cast(row, tl.int64) * width + (column - first))
    at += tl.arange(0, BLOCK_N)[:, None] * width + tl.arange(0, BLOCK_M)[None, :]
    tl.store(at, g.to(out_ptr.dtype.element_ty), mask=n_real[:, None])


@triton.jit(do_not_specialize=["rows", "inner", "left", "split", "piece"])
def product_kernel(
    g_ptr,  # [N, width]
    f_ptr,  # [columns, D] (student's gradient: the anchors) or [N, D] (anchors' gradient: the student)
    out_ptr,  # [splits, N, D] fp32, or [columns, D] if TRANSPOSED
    grad_ptr,  # [], used if TRANSPOSED
    scale_ptr,  # [] or None, used if TRANSPOSED
    rows,  # of the output
    inner,  # entries of g to sum over: width, or N if TRANSPOSED
    left,  # rows of f: fewer than inner where the last columns of g are not in the matrix, and 0
    D,
    width,
    split,  # of the entries, taken by one program; a multiple of BLOCK_K
    outer,  # times grad and scale, if TRANSPOSED
    piece,  # number of the piece; from 1 on, adds to what out holds
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``g f``, or ``grad · outer · scale · gᵀ f`` if TRANSPOSED. Grid (blocks of d for every block of rows, splits)."""
    blocks = (D + BLOCK_D - 1) // BLOCK_D
    first = tl.program_id(0) % blocks * BLOCK_D
    row = tl.program_id(0) // blocks * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    begin = tl.program_id(1) * split
    for start in range(begin, tl.minimum(begin + split, inner), BLOCK_K):
        i = tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            g = g_ptr + (tl.cast(start, tl.int64) * width + row) + (i[:, None] * width + r[None, :])
            g = tl.trans(tl.load(g, mask=(start + i < inner)[:, None] & (row + r < width)[None, :], other=0.0))
        else:
            g = (
                g_ptr
                + (tl.cast(row, tl.int64) * width + start)
                + (tl.minimum(r, rows - row - 1)[:, None] * width + i[None, :])
            )
            g = tl.load(g, mask=(start + i < inner)[None, :], other=0.0)
        f = load_block(f_ptr, start, left - start, first, D, EVEN, False, BLOCK_K, BLOCK_D)
        acc = tl.dot(g, f, acc, input_precision=PRECISION)
    d = first + tl.arange(0, BLOCK_D)
    inside = (row + r < rows)[:, None] & (d < D)[None, :]
    at = out_ptr + (tl.program_id(1).to(tl.int64) * rows + row) * D + (r[:, None] * D + d[None, :])
    if TRANSPOSED:
        outer *= tl.load(grad_ptr)
        if scale_ptr is not None:
            outer *= tl.load(scale_ptr).to(tl.float32)
        acc *= outer
    elif piece > 0:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "total"])
def finish_kernel(
    grad_ptr,  # []
    student_ptr,  # [N, D]
    scale_ptr,  # [] or None
    parts_ptr,  # [splits, N, D]
    out_ptr,  # [N, D] or None
    dots_ptr,  # [programs] or None: Σ student · Σ_splits parts, for the gradient of logit_scale
    grad_scale_ptr,  # [] or None
    finished_ptr,  # [] int32, 0
    splits,
    total,  # N · D
    scale,
    outer,
    dot_factor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """``grad · outer · scale · Σ_splits parts``, BLOCK elements a program and STEP splits at once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, STEP):
        g = start + tl.arange(0, STEP)
        at = parts_ptr + g.to(tl.int64)[:, None] * total + i[None, :]
        acc += tl.sum(tl.load(at, mask=(g < splits)[:, None] & real[None, :], other=0.0), 0)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    grad = tl.load(grad_ptr)
    if out_ptr is not None:
        tl.store(out_ptr + i, (acc * (grad * outer * scale)).to(out_ptr.dtype.element_ty), mask=real)
    if dots_ptr is not None:
        student = tl.load(student_ptr + i, mask=real, other=0.0).to(tl.float32)
        tl.store(dots_ptr + tl.program_id(0), tl.sum(acc * student, 0))
        add_up(dots_ptr, grad_scale_ptr, finished_ptr, grad * dot_factor)

"""Distillation from features in Triton: tiles of the similarity matrix that never leave the processor.

Forward: a program takes a block of rows and a group of columns (few rows and many columns are the usual case), with online
log-sum-exps over its columns in registers; the softmax over the rows is finished per tile. A second kernel merges what the
programs leave, in a fixed order. Backward: the tiles are computed again, each program keeping rows of the gradient and a part of d.
``z = logits / temperature``; the statistics are those of ``csrc/distill_kl/cpu_kernels.h``.
"""

from __future__ import annotations

import triton
import triton.language as tl

STUDENT_STATS = tl.constexpr(2)  # maximum, Σ exp
TEACHER_STATS = tl.constexpr(5)  # maximum, Σ e_t, Σ w e_t, Σ w e_t (z_s - max_s), Σ w e_t (z_t - max_t)
OUTSIDE = tl.constexpr(-1e30)  # z where there is no entry: far below every other, and finite


@triton.jit
def _load_block(ptr, row, real, column, D, EVEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a row-major matrix with D columns, from (row, column) on; rows that are not ``real`` are 0.

    One 64-bit address and 32-bit offsets from it: whole tiles of 64-bit addresses would take most of the registers.
    """
    d = tl.arange(0, BLOCK_D)
    at = ptr + (tl.cast(row, tl.int64) * D + column) + (tl.arange(0, real.shape[0])[:, None] * D + d[None, :])
    if EVEN:
        return tl.load(at, mask=real[:, None], other=0.0)
    return tl.load(at, mask=real[:, None] & (column + d < D)[None, :], other=0.0)


@triton.jit
def _product(
    f_ptr, a_ptr, row, n_real, column, m_real, D, EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr
):
    """f aᵀ [BLOCK_N, BLOCK_M] in fp32, of the rows from ``row`` and the anchors from ``column`` on."""
    z = tl.zeros((n_real.shape[0], m_real.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        f = _load_block(f_ptr, row, n_real, start, D, EVEN, BLOCK_D)
        a = _load_block(a_ptr, column, m_real, start, D, EVEN, BLOCK_D)
        z = tl.dot(f, tl.trans(a), z, input_precision=PRECISION)
    return z


@triton.jit
def _products(
    s_ptr, t_ptr, a_ptr, row, n_real, column, m_real, D,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s aᵀ and t aᵀ, reading the anchors once."""
    z_s = tl.zeros((n_real.shape[0], m_real.shape[0]), tl.float32)
    z_t = tl.zeros((n_real.shape[0], m_real.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        a = tl.trans(_load_block(a_ptr, column, m_real, start, D, EVEN, BLOCK_D))
        s = _load_block(s_ptr, row, n_real, start, D, EVEN, BLOCK_D)
        t = _load_block(t_ptr, row, n_real, start, D, EVEN, BLOCK_D)
        z_s = tl.dot(s, a, z_s, input_precision=PRECISION)
        z_t = tl.dot(t, a, z_t, input_precision=PRECISION)
    return z_s, z_t


@triton.jit
def _finish_logits(z, scale, masked, n, n_real, m, m_real, MASK_DIAGONAL: tl.constexpr):
    """Scaled logits, the diagonal masked, nothing outside the matrix."""
    z *= scale
    if MASK_DIAGONAL:
        z = tl.where(n[:, None] == m[None, :], masked, z)
    return tl.where(n_real[:, None] & m_real[None, :], z, OUTSIDE)


@triton.jit
def _student_and_teacher(
    student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, row, n, n_real, column, m, m_real, D, D_T, scale, masked,
    SHARED: tl.constexpr, MASK_DIAGONAL: tl.constexpr, EVEN: tl.constexpr, EVEN_T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of the student and of one teacher on a tile, [BLOCK_N, BLOCK_M] each."""
    if SHARED:
        z_s, z_t = _products(
            student_ptr, teacher_ptr, anchors_ptr, row, n_real, column, m_real, D, EVEN, PRECISION, BLOCK_D
        )
    else:
        z_s = _product(student_ptr, anchors_ptr, row, n_real, column, m_real, D, EVEN, PRECISION, BLOCK_D)
        z_t = _product(teacher_ptr, teacher_anchors_ptr, row, n_real, column, m_real, D_T, EVEN_T, PRECISION, BLOCK_D)
    z_s = _finish_logits(z_s, scale, masked, n, n_real, m, m_real, MASK_DIAGONAL)
    z_t = _finish_logits(z_t, scale, masked, n, n_real, m, m_real, MASK_DIAGONAL)
    return z_s, z_t


@triton.jit
def forward_kernel(
    student_ptr,  # [N, D]
    teacher_ptr,  # [K, N, D_T]
    anchors_ptr,  # [M, D]
    teacher_anchors_ptr,  # [M, D_T], unused if SHARED
    weight_ptr,  # [K, N] or None
    scale_ptr,  # [] or None
    row_parts_ptr,  # [column groups, 2 + 5K, N]
    column_parts_ptr,  # [row blocks, 2 + 5K, M]
    N,
    M,
    D,
    D_T,
    group,  # columns of a group, a multiple of BLOCK_M
    scale,
    masked,
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
    """Grid (row blocks, column groups, K)."""
    k = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    n_real = n < N
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + k.to(tl.int64) * N + n, mask=n_real, other=0.0)
    else:
        weight = n_real.to(tl.float32)
    teacher_ptr += k.to(tl.int64) * N * D_T
    stats = STUDENT_STATS + TEACHER_STATS * K
    first = STUDENT_STATS + TEACHER_STATS * k
    columns = column_parts_ptr + tl.program_id(0).to(tl.int64) * stats * M
    max_s = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
    max_t = tl.full((BLOCK_N,), OUTSIDE, tl.float32)
    sum_s = tl.zeros((BLOCK_N,), tl.float32)
    sum_t = tl.zeros((BLOCK_N,), tl.float32)
    cross = tl.zeros((BLOCK_N,), tl.float32)
    entropy = tl.zeros((BLOCK_N,), tl.float32)
    begin = tl.program_id(1) * group
    for start in range(begin, tl.minimum(begin + group, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_real = m < M
        z_s, z_t = _student_and_teacher(
            student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, row, n, n_real, start, m, m_real, D, D_T, scale, masked,
            SHARED, MASK_DIAGONAL, EVEN, EVEN_T, PRECISION, BLOCK_D,
        )  # fmt: skip
        if COLUMNS:  # the softmax over the rows of this block: final within the tile
            top_s, top_t = tl.max(z_s, 0), tl.max(z_t, 0)  # [BLOCK_M]
            r_s, r_t = z_s - top_s[None, :], z_t - top_t[None, :]
            e_t = tl.exp(r_t)
            weighted = e_t * weight[:, None]
            at = columns + m
            if k == 0:
                tl.store(at, top_s, mask=m_real)
                tl.store(at + M, tl.sum(tl.exp(r_s), 0), mask=m_real)
            at += first * M
            tl.store(at, top_t, mask=m_real)
            tl.store(at + M, tl.sum(e_t, 0), mask=m_real)
            tl.store(at + 2 * M, tl.sum(weighted, 0), mask=m_real)
            tl.store(at + 3 * M, tl.sum(weighted * r_s, 0), mask=m_real)
            tl.store(at + 4 * M, tl.sum(weighted * r_t, 0), mask=m_real)
        if ROWS:  # the softmax over the columns: online
            new_s, new_t = tl.maximum(max_s, tl.max(z_s, 1)), tl.maximum(max_t, tl.max(z_t, 1))  # [BLOCK_N]
            r_s, r_t = z_s - new_s[:, None], z_t - new_t[:, None]
            e_t = tl.exp(r_t)
            shrink = tl.exp(max_t - new_t)
            sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(r_s), 1)
            cross = shrink * (cross + sum_t * (max_s - new_s)) + tl.sum(e_t * r_s, 1)
            entropy = shrink * (entropy + sum_t * (max_t - new_t)) + tl.sum(e_t * r_t, 1)
            sum_t = sum_t * shrink + tl.sum(e_t, 1)
            max_s, max_t = new_s, new_t
    if ROWS:
        at = row_parts_ptr + tl.program_id(1).to(tl.int64) * stats * N + n
        if k == 0:
            tl.store(at, max_s, mask=n_real)
            tl.store(at + N, sum_s, mask=n_real)
        at += first * N
        tl.store(at, max_t, mask=n_real)
        tl.store(at + N, sum_t, mask=n_real)
        tl.store(at + 2 * N, weight * sum_t, mask=n_real)
        tl.store(at + 3 * N, weight * cross, mask=n_real)
        tl.store(at + 4 * N, weight * entropy, mask=n_real)


@triton.jit
def _merge(
    parts_ptr, groups, out_ptr, mass_ptr, lse_t_ptr, n, block,
    K: tl.constexpr, KL: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the statistics of all groups at BLOCK of n positions; returns the sum of the losses there, without T²."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    real = i < n
    group = (STUDENT_STATS + TEACHER_STATS * K) * n
    at = parts_ptr + i
    max_s = tl.full((BLOCK,), OUTSIDE, tl.float32)
    for g in range(groups):
        max_s = tl.maximum(max_s, tl.load(at + g * group, mask=real, other=0.0))
    sum_s = tl.zeros((BLOCK,), tl.float32)
    for g in range(groups):
        part = at + g * group
        shrink = tl.exp(tl.load(part, mask=real, other=0.0) - max_s)
        sum_s += shrink * tl.load(part + n, mask=real, other=1.0)
    log_s = tl.log(sum_s)
    tl.store(out_ptr + i, max_s + log_s, mask=real)
    loss = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        teacher = at + (STUDENT_STATS + TEACHER_STATS * k) * n
        max_t = tl.full((BLOCK,), OUTSIDE, tl.float32)
        for g in range(groups):
            max_t = tl.maximum(max_t, tl.load(teacher + g * group, mask=real, other=0.0))
        sum_t = tl.zeros((BLOCK,), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        cross = tl.zeros((BLOCK,), tl.float32)
        entropy = tl.zeros((BLOCK,), tl.float32)
        for g in range(groups):
            part = teacher + g * group
            part_max = tl.load(part, mask=real, other=0.0)
            part_mass = tl.load(part + 2 * n, mask=real, other=0.0)
            moved = tl.load(at + g * group, mask=real, other=0.0) - max_s
            shrink = tl.exp(part_max - max_t)
            sum_t += shrink * tl.load(part + n, mask=real, other=1.0)
            mass += shrink * part_mass
            cross += shrink * (tl.load(part + 3 * n, mask=real, other=0.0) + part_mass * moved)
            entropy += shrink * (tl.load(part + 4 * n, mask=real, other=0.0) + part_mass * (part_max - max_t))
        log_t = tl.log(sum_t)
        term = mass * log_s - cross
        if KL:
            term += entropy - mass * log_t
        loss += term / sum_t
        total += mass / sum_t
        tl.store(lse_t_ptr + k * n + i, max_t + log_t, mask=real)
    if MASS:
        tl.store(mass_ptr + i, total, mask=real)
    return tl.sum(tl.where(real, loss, 0.0), 0)


@triton.jit
def merge_kernel(
    row_parts_ptr,  # [column_groups, 2 + 5K, N]
    column_parts_ptr,  # [row_blocks, 2 + 5K, M]
    row_stats_ptr,  # [1 + K, N]
    column_stats_ptr,  # [2 + K, M]
    losses_ptr,  # [programs]
    N,
    M,
    column_groups,
    row_blocks,
    row_programs,
    row_factor,  # rows T² / N
    column_factor,  # columns T² / M
    K: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first ``row_programs`` programs merge the row direction, the others the column direction."""
    pid = tl.program_id(0)
    if pid < row_programs:
        loss = _merge(
            row_parts_ptr, column_groups, row_stats_ptr, row_stats_ptr, row_stats_ptr + N, N, pid, K, KL, False, BLOCK
        )
        tl.store(losses_ptr + pid, loss * row_factor)
    else:
        loss = _merge(
            column_parts_ptr, row_blocks, column_stats_ptr, column_stats_ptr + M, column_stats_ptr + 2 * M, M,
            pid - row_programs, K, KL, True, BLOCK,
        )  # fmt: skip
        tl.store(losses_ptr + pid, loss * column_factor)


@triton.jit
def _add_probabilities(
    g, z, n, n_real, m, m_real, weight, mass, row_lse_ptr, column_lse_ptr, row_factor, column_factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g + row_factor · weight · softmax over columns + column_factor · mass · softmax over rows."""
    if ROWS:
        lse = tl.load(row_lse_ptr + n, mask=n_real, other=0.0)
        g += (row_factor * weight)[:, None] * tl.exp(z - lse[:, None])
    if COLUMNS:
        lse = tl.load(column_lse_ptr + m, mask=m_real, other=0.0)
        g += column_factor * mass * tl.exp(z - lse[None, :])
    return g


@triton.jit
def _tile_gradient(
    student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, weight_ptr, row_stats_ptr, column_stats_ptr,
    row, n, n_real, column, m, m_real, N, M, D, D_T, scale, masked, row_factor, column_factor,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARED: tl.constexpr, MASK_DIAGONAL: tl.constexpr,
    EVEN: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the student's logits, [BLOCK_N, BLOCK_M]; 0 outside the matrix and on a masked diagonal."""
    g = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    total = tl.zeros((n.shape[0],), tl.float32)
    z_s = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    for k in tl.static_range(K):
        teacher = teacher_ptr + k * N * D_T
        if k == 0:
            z_s, z_t = _student_and_teacher(
                student_ptr, teacher, anchors_ptr, teacher_anchors_ptr, row, n, n_real, column, m, m_real, D, D_T, scale, masked,
                SHARED, MASK_DIAGONAL, EVEN, EVEN_T, PRECISION, BLOCK_D,
            )  # fmt: skip
        else:
            own = anchors_ptr if SHARED else teacher_anchors_ptr
            z_t = _product(teacher, own, row, n_real, column, m_real, D_T, EVEN_T, PRECISION, BLOCK_D)
            z_t = _finish_logits(z_t, scale, masked, n, n_real, m, m_real, MASK_DIAGONAL)
        weight = n_real.to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + k * N + n, mask=n_real, other=0.0)
        total += weight
        g = _add_probabilities(
            g, z_t, n, n_real, m, m_real, weight, weight[:, None], row_stats_ptr + (1 + k) * N,
            column_stats_ptr + (2 + k) * M, -row_factor, -column_factor, ROWS, COLUMNS,
        )  # fmt: skip
    mass = tl.load(column_stats_ptr + M + m, mask=m_real & COLUMNS, other=0.0)[None, :]
    g = _add_probabilities(
        g,
        z_s,
        n,
        n_real,
        m,
        m_real,
        total,
        mass,
        row_stats_ptr,
        column_stats_ptr,
        row_factor,
        column_factor,
        ROWS,
        COLUMNS,
    )
    inside = n_real[:, None] & m_real[None, :]
    if MASK_DIAGONAL:
        inside = inside & (n[:, None] != m[None, :])
    return tl.where(inside, g, 0.0)


@triton.jit
def backward_student_kernel(
    student_ptr,  # [N, D]
    teacher_ptr,  # [K, N, D_T]
    anchors_ptr,  # [M, D]
    teacher_anchors_ptr,  # [M, D_T], unused if SHARED
    weight_ptr,  # [K, N] or None
    scale_ptr,  # [] or None
    row_stats_ptr,  # [1 + K, N]
    column_stats_ptr,  # [2 + K, M]
    parts_ptr,  # [column groups, N, D]: Σ_m g[n, m] anchors[m]
    N,
    M,
    D,
    D_T,
    group,
    scale,
    masked,
    row_factor,
    column_factor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MASK_DIAGONAL: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (row blocks, column groups, blocks of BLOCK_OUT of d)."""
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    n_real = n < N
    first = tl.program_id(2) * BLOCK_OUT
    out = first + tl.arange(0, BLOCK_OUT)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    begin = tl.program_id(1) * group
    for start in range(begin, tl.minimum(begin + group, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_real = m < M
        g = _tile_gradient(
            student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, weight_ptr, row_stats_ptr, column_stats_ptr,
            row, n, n_real, start, m, m_real, N, M, D, D_T, scale, masked, row_factor, column_factor,
            K, ROWS, COLUMNS, SHARED, MASK_DIAGONAL, EVEN, EVEN_T, PRECISION, BLOCK_D,
        )  # fmt: skip
        a = _load_block(anchors_ptr, start, m_real, first, D, EVEN_OUT, BLOCK_OUT)
        acc = tl.dot(g.to(a.dtype), a, acc, input_precision=PRECISION)
    at = parts_ptr + (tl.program_id(1).to(tl.int64) * N + n)[:, None] * D + out[None, :]
    tl.store(at, acc, mask=n_real[:, None] & (out < D)[None, :])


@triton.jit
def backward_anchors_kernel(
    grad_ptr,  # []
    student_ptr,  # [N, D]
    teacher_ptr,  # [K, N, D_T]
    anchors_ptr,  # [M, D]
    teacher_anchors_ptr,  # [M, D_T], unused if SHARED
    weight_ptr,  # [K, N] or None
    scale_ptr,  # [] or None
    row_stats_ptr,  # [1 + K, N]
    column_stats_ptr,  # [2 + K, M]
    out_ptr,  # [M, D]
    N,
    M,
    D,
    D_T,
    scale,
    masked,
    row_factor,
    column_factor,
    outer,  # times grad and scale: what the factors were divided by, times the temperature
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    MASK_DIAGONAL: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (column blocks, blocks of BLOCK_OUT of d)."""
    column = tl.program_id(0) * BLOCK_M
    m = column + tl.arange(0, BLOCK_M)
    m_real = m < M
    first = tl.program_id(1) * BLOCK_OUT
    out = first + tl.arange(0, BLOCK_OUT)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_real = n < N
        g = _tile_gradient(
            student_ptr, teacher_ptr, anchors_ptr, teacher_anchors_ptr, weight_ptr, row_stats_ptr, column_stats_ptr,
            start, n, n_real, column, m, m_real, N, M, D, D_T, scale, masked, row_factor, column_factor,
            K, ROWS, COLUMNS, SHARED, MASK_DIAGONAL, EVEN, EVEN_T, PRECISION, BLOCK_D,
        )  # fmt: skip
        f = _load_block(student_ptr, start, n_real, first, D, EVEN_OUT, BLOCK_OUT)
        acc = tl.dot(tl.trans(g.to(f.dtype)), f, acc, input_precision=PRECISION)
    acc *= tl.load(grad_ptr) * outer * scale
    at = out_ptr + m.to(tl.int64)[:, None] * D + out[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=m_real[:, None] & (out < D)[None, :])


@triton.jit
def merge_student_kernel(
    grad_ptr,  # []
    student_ptr,  # [N, D]
    scale_ptr,  # [] or None
    parts_ptr,  # [groups, N, D]
    out_ptr,  # [N, D] or None
    dots_ptr,  # [programs] or None: Σ student · Σ_groups parts, for the gradient of logit_scale
    groups,
    total,  # N · D; 64 bits where N · D · groups needs them
    scale,
    outer,
    BLOCK: tl.constexpr,
):
    """``grad · outer · scale · Σ_groups parts``, BLOCK elements a program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for g in range(groups):
        acc += tl.load(parts_ptr + g * total + i, mask=real, other=0.0)
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr).to(tl.float32)
    if out_ptr is not None:
        gradient = acc * (tl.load(grad_ptr) * outer * scale)
        tl.store(out_ptr + i, gradient.to(out_ptr.dtype.element_ty), mask=real)
    if dots_ptr is not None:
        student = tl.load(student_ptr + i, mask=real, other=0.0).to(tl.float32)
        tl.store(dots_ptr + tl.program_id(0), tl.sum(acc * student, 0))

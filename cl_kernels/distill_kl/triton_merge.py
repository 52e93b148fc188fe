"""Statistics of soft-maxes in Triton: how those of parts of a row or column become those of the whole, and the loss."""

from __future__ import annotations

import triton
import triton.language as tl

from cl_kernels.distill_kl.triton_tiles import OUTSIDE

STATS = tl.constexpr(8)
"""Numbers per row or column and teacher: level_s, Σ e_s, level_t, Σ e_t, Σ w e_t, Σ w e_t y; two are unused.

``e = 2^(z - level)`` with a level near the largest z, and ``y`` is ``z_s - level_s``, for the Kullback-Leibler divergence less
``z_t - level_t``."""


@triton.jit
def join_statistics(
    level_s, sum_s, level_t, sum_t, mass, cross,
    other_s, other_sum_s, other_t, other_sum_t, other_mass, other_cross, KL: tl.constexpr,
):  # fmt: skip
    """Statistics of two sets together, from the statistics of each."""
    new_s, new_t = tl.maximum(level_s, other_s), tl.maximum(level_t, other_t)
    level_s -= new_s
    level_t -= new_t
    other_s -= new_s
    other_t -= new_t
    shrink, other_shrink = tl.exp2(level_t), tl.exp2(other_t)
    sum_s = sum_s * tl.exp2(level_s) + other_sum_s * tl.exp2(other_s)
    sum_t = sum_t * shrink + other_sum_t * other_shrink
    cross += mass * (level_s - level_t if KL else level_s)
    other_cross += other_mass * (other_s - other_t if KL else other_s)
    return (
        new_s,
        sum_s,
        new_t,
        sum_t,
        shrink * mass + other_shrink * other_mass,
        shrink * cross + other_shrink * other_cross,
    )


@triton.jit
def load_statistics(at, mask):
    """The statistics stored at ``at``; those of nothing where ``mask`` is False."""
    return (
        tl.load(at, mask=mask, other=OUTSIDE),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=OUTSIDE),
        tl.load(at + 3, mask=mask, other=0.0),
        tl.load(at + 4, mask=mask, other=0.0),
        tl.load(at + 5, mask=mask, other=0.0),
    )


@triton.jit
def store_statistics(at, mask, level_s, sum_s, level_t, sum_t, mass, cross):
    """Stores what ``load_statistics`` reads."""
    tl.store(at, level_s, mask=mask)
    tl.store(at + 1, sum_s, mask=mask)
    tl.store(at + 2, level_t, mask=mask)
    tl.store(at + 3, sum_t, mask=mask)
    tl.store(at + 4, mass, mask=mask)
    tl.store(at + 5, cross, mask=mask)


@triton.jit
def _merge(
    parts_ptr, groups, out_ptr, mass_ptr, lse_t_ptr, n, block,
    K: tl.constexpr, KL: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merges all groups at BLOCK of n positions, STEP groups at once; returns the sum of the losses, to base 2 and without T²."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    real = i < n
    loss = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        level_s = tl.full((BLOCK,), OUTSIDE, tl.float32)
        level_t = tl.full((BLOCK,), OUTSIDE, tl.float32)
        sum_s = tl.zeros((BLOCK,), tl.float32)
        sum_t = tl.zeros((BLOCK,), tl.float32)
        mass = tl.zeros((BLOCK,), tl.float32)
        cross = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, groups, STEP):
            g = start + tl.arange(0, STEP)
            mask = (g < groups)[:, None] & real[None, :]
            at = parts_ptr + ((g.to(tl.int64) * K + k)[:, None] * n + i[None, :]) * STATS
            part_s, part_sum_s, part_t, part_sum_t, part_mass, part_cross = load_statistics(at, mask)  # [STEP, BLOCK]
            new_s, new_t = tl.max(part_s, 0), tl.max(part_t, 0)
            part_s -= new_s[None, :]
            part_t -= new_t[None, :]
            shrink = tl.exp2(part_t)
            part_cross += part_mass * (part_s - part_t if KL else part_s)
            level_s, sum_s, level_t, sum_t, mass, cross = join_statistics(
                level_s, sum_s, level_t, sum_t, mass, cross,
                new_s,
                tl.sum(tl.exp2(part_s) * part_sum_s, 0),
                new_t,
                tl.sum(shrink * part_sum_t, 0),
                tl.sum(shrink * part_mass, 0),
                tl.sum(shrink * part_cross, 0),
                KL,
            )  # fmt: skip
        log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
        loss += (mass * (log_s - log_t if KL else log_s) - cross) / sum_t
        total += mass / sum_t
        if k == 0:
            tl.store(out_ptr + i, level_s + log_s, mask=real)
        tl.store(lse_t_ptr + k * n + i, level_t + log_t, mask=real)
    if MASS:
        tl.store(mass_ptr + i, total, mask=real)
    return tl.sum(tl.where(real, loss, 0.0), 0)


@triton.jit(do_not_specialize=["N", "M", "column_groups", "row_slots", "row_programs"])
def merge_kernel(
    row_parts_ptr,  # [column groups, K, N, STATS]
    column_parts_ptr,  # [row slots, K, M, STATS]
    row_stats_ptr,  # [1 + K, N], log-sum-exps to base 2
    column_stats_ptr,  # [2 + K, M]
    losses_ptr,  # [programs]
    loss_ptr,  # []
    finished_ptr,  # [] int32, 0
    N,
    M,
    column_groups,
    row_slots,
    row_programs,
    row_factor,  # rows T² / N · log(2)
    column_factor,  # columns T² / M · log(2)
    K: tl.constexpr,
    KL: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ROW_STEP: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
):
    """The first ``row_programs`` programs merge the row direction, the others the column direction; the last to end adds all up."""
    pid = tl.program_id(0)
    if pid < row_programs:
        loss = row_factor * _merge(
            row_parts_ptr, column_groups, row_stats_ptr, row_stats_ptr, row_stats_ptr + N, N, pid,
            K, KL, False, ROW_BLOCK, ROW_STEP,
        )  # fmt: skip
        tl.store(losses_ptr + pid, loss)
    else:
        loss = column_factor * _merge(
            column_parts_ptr, row_slots, column_stats_ptr, column_stats_ptr + M, column_stats_ptr + 2 * M, M,
            pid - row_programs, K, KL, True, COLUMN_BLOCK, COLUMN_STEP,
        )  # fmt: skip
        tl.store(losses_ptr + pid, loss)
    add_up(losses_ptr, loss_ptr, finished_ptr, 1.0)


@triton.jit
def add_up(parts_ptr, out_ptr, finished_ptr, factor):
    """The last program to arrive stores ``factor · Σ parts`` over all programs, in the same order whichever it is."""
    programs = tl.num_programs(0)
    tl.debug_barrier()  # the part is stored before the program counts as finished
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == programs - 1:
        lane = tl.arange(0, 128)
        total = tl.zeros((128,), tl.float32)
        for start in range(0, programs, 128):
            total += tl.load(parts_ptr + start + lane, mask=start + lane < programs, other=0.0, volatile=True)
        tl.store(out_ptr, factor * tl.sum(total, 0))

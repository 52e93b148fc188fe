"""Distillation from logits in Triton: one read of both logits forward, one read and one write backward.

A program takes ``SLICES`` slices and walks along their M entries in steps of ``STEP``, so the block stays small for any M.
The gradient gets memory of its own, or the student's where the caller says that nobody needs the logits any more: other losses, a
graph that is kept or the operation that made them may, and an operation cannot see who does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels.distill_kl.reference import compute_dtype

BLOCK = 4096
"""Most entries that a program holds of each side; more spills."""

PROGRAMS = 1024
"""Programs that fill the largest GPU."""


@triton.jit
def _origin(maximum):
    """A maximum to measure from: 0 instead of -inf, so that no difference of infinities appears."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _positions(outer, inner, INNER: tl.constexpr, SLICES: tl.constexpr):
    """Indices (outer, inner) of the program's slices, and which of them exist; [SLICES] each.

    Blocks of both lie along one dimension of the grid: the others end at 65,535 programs.
    """
    lane = tl.arange(0, SLICES)
    if INNER:
        blocks = (inner + SLICES - 1) // SLICES
        o = tl.program_id(0) // blocks + tl.zeros((SLICES,), tl.int32)
        i = tl.program_id(0) % blocks * SLICES + lane
    else:
        o = tl.program_id(0) * SLICES + lane
        i = tl.zeros((SLICES,), tl.int32)
    # Offsets are 64 bits wide: neighbours along `inner` may lie a whole row apart.
    return o.to(tl.int64), i.to(tl.int64), (o < outer) & (i < inner)


@triton.jit
def _load(slices, step, stride, mask, other, inverse_temperature, COMPUTE: tl.constexpr):
    """Logits over temperature, [SLICES, STEP], of the slices that start at ``slices``."""
    return tl.load(slices[:, None] + step * stride, mask=mask, other=other).to(COMPUTE) * inverse_temperature


@triton.jit(do_not_specialize=["outer", "M", "inner", "slices"])
def forward_kernel(
    student_ptr,  # [outer, M, inner], strides below
    teacher_ptr,  # [outer, M, inner]
    loss_ptr,  # [outer, inner]
    stats_ptr,  # [4, outer, inner]
    outer,
    M,
    inner,
    slices,  # outer · inner
    student_outer,
    student_step,
    student_inner,
    teacher_outer,
    teacher_step,
    teacher_inner,
    inverse_temperature,
    factor,
    KL: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    SLICES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Losses and statistics, online along M. Grid (blocks of slices,); one outer index a program if INNER."""
    o, i, real = _positions(outer, inner, INNER, SLICES)
    student = student_ptr + o * student_outer + i * student_inner  # [SLICES]
    teacher = teacher_ptr + o * teacher_outer + i * teacher_inner
    max_s = tl.full((SLICES,), float("-inf"), COMPUTE)
    max_t = tl.full((SLICES,), float("-inf"), COMPUTE)
    sum_s = tl.zeros((SLICES,), COMPUTE)
    sum_t = tl.zeros((SLICES,), COMPUTE)
    cross = tl.zeros((SLICES,), COMPUTE)  # Σ e_t (z_s - max_s)
    entropy = tl.zeros((SLICES,), COMPUTE)  # Σ e_t (z_t - max_t)
    for start in range(0, M, STEP):
        m = start + tl.arange(0, STEP)
        mask = real[:, None] & (m < M)[None, :]
        step = m.to(tl.int64)[None, :]
        z_s = _load(student, step, student_step, mask, float("-inf"), inverse_temperature, COMPUTE)
        z_t = _load(teacher, step, teacher_step, mask, float("-inf"), inverse_temperature, COMPUTE)
        new_s = tl.maximum(max_s, tl.max(z_s, 1))
        new_t = tl.maximum(max_t, tl.max(z_t, 1))
        from_s, from_t = _origin(new_s), _origin(new_t)
        z_s -= from_s[:, None]
        z_t -= from_t[:, None]
        sum_s = sum_s * tl.exp(max_s - from_s) + tl.sum(tl.exp(z_s), 1)
        e_t = tl.exp(z_t)
        shrink = tl.exp(max_t - from_t)
        cross += sum_t * (_origin(max_s) - from_s)
        cross = tl.where(shrink == 0, 0.0, shrink * cross) + tl.sum(tl.where(e_t == 0, 0.0, e_t * z_s), 1)
        if KL:
            entropy += sum_t * (_origin(max_t) - from_t)
            entropy = tl.where(shrink == 0, 0.0, shrink * entropy) + tl.sum(tl.where(e_t == 0, 0.0, e_t * z_t), 1)
        sum_t = sum_t * shrink + tl.sum(e_t, 1)
        max_s, max_t = new_s, new_t
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    loss = log_s - cross / sum_t
    if KL:
        loss += entropy / sum_t - log_t
    at = o * inner + i
    tl.store(loss_ptr + at, loss * factor, mask=real)
    stats = stats_ptr + at
    tl.store(stats, max_s, mask=real)
    tl.store(stats + slices, log_s, mask=real)
    tl.store(stats + 2 * tl.cast(slices, tl.int64), max_t, mask=real)
    tl.store(stats + 3 * tl.cast(slices, tl.int64), log_t, mask=real)


@triton.jit(do_not_specialize=["outer", "M", "inner", "slices", "chunk"])
def backward_kernel(
    grad_ptr,  # [outer, inner]
    student_ptr,  # [outer, M, inner], strides below
    teacher_ptr,  # [outer, M, inner]
    stats_ptr,  # [4, outer, inner]
    out_ptr,  # [outer, M, inner]
    outer,
    M,
    inner,
    slices,  # outer · inner
    student_outer,
    student_step,
    student_inner,
    teacher_outer,
    teacher_step,
    teacher_inner,
    inverse_temperature,
    factor,
    chunk,  # entries of a program, a multiple of STEP
    INNER: tl.constexpr,
    OVERWRITE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SLICES: tl.constexpr,
    STEP: tl.constexpr,
):
    """``factor · grad · (p_s − p_t)``, element by element. Grid as in the forward kernel, by chunks of the M entries."""
    o, i, real = _positions(outer, inner, INNER, SLICES)
    student = student_ptr + o * student_outer + i * student_inner
    teacher = teacher_ptr + o * teacher_outer + i * teacher_inner
    at = o * inner + i
    grad = tl.load(grad_ptr + at, mask=real, other=0.0).to(COMPUTE) * factor  # [SLICES]
    stats = stats_ptr + at
    max_s = tl.load(stats, mask=real, other=0.0)
    log_s = tl.load(stats + slices, mask=real, other=0.0)
    max_t = tl.load(stats + 2 * tl.cast(slices, tl.int64), mask=real, other=0.0)
    log_t = tl.load(stats + 3 * tl.cast(slices, tl.int64), mask=real, other=0.0)
    begin = tl.program_id(1) * chunk
    for start in range(begin, tl.minimum(begin + chunk, M), STEP):
        m = start + tl.arange(0, STEP)
        mask = real[:, None] & (m < M)[None, :]
        step = m.to(tl.int64)[None, :]
        z_s = _load(student, step, student_step, mask, 0.0, inverse_temperature, COMPUTE)
        z_t = _load(teacher, step, teacher_step, mask, 0.0, inverse_temperature, COMPUTE)
        p_s = tl.exp((z_s - max_s[:, None]) - log_s[:, None])
        p_t = tl.exp((z_t - max_t[:, None]) - log_t[:, None])
        out = out_ptr + (o[:, None] * M + step) * inner + i[:, None]
        if OVERWRITE:
            tl.debug_barrier()  # all threads have read the block
        tl.store(out, (grad[:, None] * (p_s - p_t)).to(out_ptr.dtype.element_ty), mask=mask)


def configuration(M: int, inner: int) -> dict[str, int | bool]:
    """Block sizes and warps for slices of M entries; ``inner`` neighbours lie side by side unless it is 1."""
    if inner > 1:
        slices, step = min(64, max(16, triton.next_power_of_2(inner))), min(16, triton.next_power_of_2(M))
    else:
        step = min(BLOCK, triton.next_power_of_2(M))
        slices = max(1, min(16, 1024 // step))
    return {"SLICES": slices, "STEP": step, "INNER": inner > 1, "num_warps": 8 if slices * step >= BLOCK else 4}


def _arguments(student: Tensor, teacher: Tensor, temperature: float) -> tuple[int, tuple, dict]:
    """Blocks of slices, the arguments from ``outer`` on, and the compile-time ones."""
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student is {tuple(student.shape)}, teacher {tuple(teacher.shape)}: expected one (outer, M, inner)"
        )
    outer, M, inner = student.shape
    config = configuration(M, inner)
    blocks = outer * triton.cdiv(inner, config["SLICES"]) if inner > 1 else triton.cdiv(outer, config["SLICES"])
    config["COMPUTE"] = tl.float64 if student.dtype == torch.float64 else tl.float32
    return blocks, (outer, M, inner, outer * inner, *student.stride(), *teacher.stride(), 1 / temperature), config


def distill_kl(student: Tensor, teacher: Tensor, temperature: float, kl: bool) -> tuple[Tensor, Tensor]:
    """Forward pass; shapes as in ``cl_kernels/schemas.py``."""
    outer, _, inner = student.shape
    dtype = compute_dtype(student.dtype)
    loss = torch.empty(outer, inner, dtype=dtype, device=student.device)
    stats = torch.empty(4, outer, inner, dtype=dtype, device=student.device)
    if loss.numel() == 0:
        return loss, stats
    factor, after = temperature**2, 1.0
    if dtype == torch.float64:  # numbers reach a kernel in fp32: apply them in fp64 outside
        student, teacher = student / temperature, teacher / temperature
        temperature, factor, after = 1.0, 1.0, factor
    blocks, arguments, config = _arguments(student, teacher, temperature)
    with torch.cuda.device_of(student):
        forward_kernel[(blocks,)](student, teacher, loss, stats, *arguments, factor, KL=kl, **config)
    return loss if after == 1 else loss.mul_(after), stats


def distill_kl_backward(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> Tensor:
    """Gradient of the student's logits; shapes as in ``cl_kernels/schemas.py``."""
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _write_gradient(grad, student, teacher, stats, temperature, out)
    return out


def distill_kl_backward_(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> None:
    """The same, written over the logits.

    Raises:
        ValueError: the logits are not contiguous.
    """
    if not student.is_contiguous():
        raise ValueError(
            f"student has strides {student.stride()}: expected contiguous logits, because they are overwritten"
        )
    _write_gradient(grad, student, teacher, stats, temperature, student)


def _write_gradient(
    grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float, out: Tensor
) -> None:
    if out.numel() == 0:
        return
    factor, grad = temperature, grad.contiguous()
    if out.dtype == torch.float64:
        student, teacher, grad, temperature, factor = (
            student / temperature,
            teacher / temperature,
            grad * factor,
            1.0,
            1.0,
        )
    blocks, arguments, config = _arguments(student, teacher, temperature)
    # Few slices would leave most of a GPU idle; every entry stands alone here, so their entries are divided, too.
    steps = triton.cdiv(student.shape[1], config["STEP"])
    chunks = min(steps, max(1, PROGRAMS // blocks))
    chunk = triton.cdiv(steps, chunks) * config["STEP"]
    with torch.cuda.device_of(student):
        backward_kernel[blocks, triton.cdiv(student.shape[1], chunk)](
            grad, student, teacher, stats, out, *arguments, factor, chunk, OVERWRITE=out is student, **config
        )

"""Launches of the feature kernels: how the similarity matrix is cut, and which block sizes a dtype gets."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from cl_kernels.distill_kl import triton_features as kernels
from cl_kernels.distill_kl.reference import MASKED

MERGE_BLOCK = 128
GRADIENT_BLOCK = 1024


def configuration(dtype: torch.dtype, N: int, backward: bool, plain: bool, amd: bool) -> dict[str, int]:
    """Block sizes, warps and pipeline stages: the largest of which no target spills (tests/aot/test_distill_kl.py).

    ``plain``: one teacher that shares the anchors, a width that is a multiple of the blocks, nothing masked.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    rows = 16 if N <= 16 else 64 if N > 32 and half and plain else 32
    config = {"BLOCK_N": rows, "BLOCK_M": 32, "BLOCK_D": 64 if half and plain and not amd else 32}
    config |= {"num_stages": 1 if amd else 2, "num_warps": 4 if amd or (plain and not half and not backward) else 8}
    if backward:
        config["BLOCK_OUT"] = 32 if amd else (256 if half else 128) if plain else 64
    return config


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _precision() -> str:
    """Products of fp32 features: exact unless the user lets matrix products use TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _group(M: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Columns of a group (a multiple of ``block``) and the number of groups: about two programs a processor in all."""
    blocks = triton.cdiv(M, block)
    groups = min(blocks, max(1, 2 * _processors(device) // programs))
    group = triton.cdiv(blocks, groups) * block
    return group, triton.cdiv(M, group)


class _Problem:
    """Contiguous inputs and the arguments that every kernel takes."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Tensor,
        teacher_anchors: Tensor | None,
        weight: Tensor | None,
        logit_scale: Tensor | None,
        factor: float,
        temperature: float,
        rows: float,
        columns: float,
        mask_diagonal: bool,
        backward: bool,
    ) -> None:
        own = anchors if teacher_anchors is None else teacher_anchors
        fits = (
            student.dim() == anchors.dim() == own.dim() == 2
            and teacher.dim() == 3
            and student.shape[1] == anchors.shape[1]
            and teacher.shape[1] == student.shape[0]
            and own.shape == (anchors.shape[0], teacher.shape[2])
            and (weight is None or weight.shape == teacher.shape[:2])
        )
        if not fits:
            shapes = [
                None if t is None else tuple(t.shape) for t in (student, teacher, anchors, teacher_anchors, weight)
            ]
            raise ValueError(f"student, teacher, anchors, teacher_anchors, weight do not fit together: {shapes}")
        self.student, self.anchors = student.contiguous(), anchors.contiguous()
        self.teacher = teacher.contiguous()
        self.K, self.N, self.D_T = teacher.shape
        self.M, self.D = anchors.shape
        shared = teacher_anchors is None
        plain = shared and self.K == 1 and not mask_diagonal and self.D % 64 == 0
        amd = torch.version.hip is not None
        self.config: dict[str, Any] = configuration(student.dtype, self.N, backward, plain, amd)
        shape_dependent: dict[str, Any] = {
            "K": self.K,
            "ROWS": rows != 0,
            "COLUMNS": columns != 0,
            "SHARED": shared,
            "MASK_DIAGONAL": mask_diagonal,
            "EVEN": self.D % self.config["BLOCK_D"] == 0,
            "EVEN_T": self.D_T % self.config["BLOCK_D"] == 0,
            "PRECISION": _precision(),
        }
        self.config |= shape_dependent
        if backward:
            self.config["EVEN_OUT"] = self.D % self.config["BLOCK_OUT"] == 0
        self.logit_scale = logit_scale
        self.scale, self.masked = factor / temperature, MASKED / temperature
        self.pointers = (
            self.student,
            self.teacher,
            self.anchors,
            own.contiguous(),
            None if weight is None else weight.contiguous(),
            logit_scale,
        )
        self.sizes = (self.N, self.M, self.D, self.D_T)
        self.row_blocks = triton.cdiv(self.N, self.config["BLOCK_N"])

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.student.device)


def feature_distill_kl(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    teacher_anchors: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    factor: float,
    temperature: float,
    rows: float,
    columns: float,
    kl: bool,
    mask_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass; shapes as in ``cl_kernels/schemas.py``. Scratch: (column groups · N + row blocks · M) · (2 + 5K) floats."""
    p = _Problem(
        student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns,
        mask_diagonal, False,
    )  # fmt: skip
    N, M, K = p.N, p.M, p.K
    row_stats, column_stats = p.empty(1 + K, N if rows else 0), p.empty(2 + K, M if columns else 0)
    if not rows and not columns:
        return torch.zeros((), dtype=torch.float32, device=student.device), row_stats, column_stats
    group, groups = _group(M, p.config["BLOCK_M"], p.row_blocks * K, student.device)
    row_parts = p.empty(groups if rows else 0, 2 + 5 * K, N)
    column_parts = p.empty(p.row_blocks if columns else 0, 2 + 5 * K, M)
    row_programs = triton.cdiv(N, MERGE_BLOCK) if rows else 0
    column_programs = triton.cdiv(M, MERGE_BLOCK) if columns else 0
    losses = p.empty(row_programs + column_programs)
    with torch.cuda.device_of(student):
        kernels.forward_kernel[(p.row_blocks, groups, K)](
            *p.pointers, row_parts, column_parts, *p.sizes, group, p.scale, p.masked, **p.config
        )
        kernels.merge_kernel[(row_programs + column_programs,)](
            row_parts,
            column_parts,
            row_stats,
            column_stats,
            losses,
            N,
            M,
            groups,
            p.row_blocks,
            row_programs,
            rows * temperature**2 / N,
            columns * temperature**2 / M,
            K=K,
            KL=kl,
            BLOCK=MERGE_BLOCK,
        )
    return losses.sum(), row_stats, column_stats


def feature_distill_kl_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    teacher_anchors: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | None,
    row_stats: Tensor,
    column_stats: Tensor,
    factor: float,
    temperature: float,
    rows: float,
    columns: float,
    mask_diagonal: bool,
    need_student: bool,
    need_anchors: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass; shapes as in ``cl_kernels/schemas.py``. Scratch: column groups · N · d floats."""
    p = _Problem(
        student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns,
        mask_diagonal, True,
    )  # fmt: skip
    grad_student = torch.empty(student.shape if need_student else (0,), dtype=student.dtype, device=student.device)
    grad_anchors = torch.empty(anchors.shape if need_anchors else (0,), dtype=anchors.dtype, device=anchors.device)
    # The tiles' gradients are held in the features' dtype: as numbers around 1, whatever N and M, so that fp16 does not lose them.
    row_factor, column_factor = rows * temperature / p.N, columns * temperature / p.M
    unit = max(abs(row_factor), abs(column_factor)) or 1.0
    factors, outer = (row_factor / unit, column_factor / unit), unit * temperature
    blocks = triton.cdiv(p.D, p.config["BLOCK_OUT"])
    statistics = (row_stats.contiguous(), column_stats.contiguous())
    grad_scale = p.empty(0)
    with torch.cuda.device_of(student):
        if need_student or need_scale:
            group, groups = _group(p.M, p.config["BLOCK_M"], p.row_blocks * blocks, student.device)
            parts, programs = p.empty(groups, p.N, p.D), triton.cdiv(p.N * p.D, GRADIENT_BLOCK)
            dots = p.empty(programs) if need_scale else None
            kernels.backward_student_kernel[(p.row_blocks, groups, blocks)](
                *p.pointers, *statistics, parts, *p.sizes, group, p.scale, p.masked, *factors, **p.config
            )
            kernels.merge_student_kernel[(programs,)](
                grad,
                p.student,
                logit_scale,
                parts,
                grad_student if need_student else None,
                dots,
                groups,
                p.N * p.D,
                p.scale,
                outer,
                BLOCK=GRADIENT_BLOCK,
            )
            if dots is not None:
                grad_scale = grad * (dots.sum() * (unit * factor))
        if need_anchors:
            kernels.backward_anchors_kernel[(triton.cdiv(p.M, p.config["BLOCK_M"]), blocks)](
                grad, *p.pointers, *statistics, grad_anchors, *p.sizes, p.scale, p.masked, *factors, outer, **p.config
            )
    return grad_student, grad_anchors, grad_scale

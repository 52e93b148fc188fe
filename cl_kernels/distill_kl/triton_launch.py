"""Launches of the feature kernels: how the similarity matrix is cut, and which block sizes a dtype gets on which GPU."""

from __future__ import annotations

from functools import cache
from math import log
from typing import Any

import torch
import triton
from torch import Tensor

from cl_kernels.distill_kl import triton_forward, triton_gradient, triton_merge
from cl_kernels.distill_kl.reference import MASKED
from cl_kernels.precision import float32_products

SCRATCH = 24 << 20
"""Bytes of a piece of the logits' gradient together with its anchors: half of an H100's second-level cache, so that the product
finds both there. It bounds the memory of the backward pass (but for 128 columns of the logits, where N is larger than 10^5)."""

WIDEST = 1 << 20
"""Columns of a piece at the most: a grid has no more than 65,535 blocks of them."""

MERGE = {"ROW_BLOCK": 16, "ROW_STEP": 64, "COLUMN_BLOCK": 256, "COLUMN_STEP": 4}
FINISH = {"BLOCK": 256, "STEP": 16}


def tile_blocks(dtype: torch.dtype, target: str, N: int, plain: bool, large: bool) -> dict[str, int]:
    """Blocks of a tile of logits, warps and pipeline stages: what no target spills (tests/aot/test_distill_kl.py).

    ``plain``: one teacher that shares the anchors, a width that is a multiple of the blocks, nothing masked. ``large``: the matrix
    has tiles for all processors; else they are made narrow so that it has. Four warps leave room for a second program on a
    processor, whose products run while the first one sums exponentials; where products read registers, that takes eight.
    """
    amd = target.startswith("gfx")
    rows = 32 if N <= 32 else 64
    if dtype not in (torch.float16, torch.bfloat16):
        rows = rows if amd else 32
        return {"BLOCK_N": rows, "BLOCK_M": 64 if large else 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    depth = 64 if plain and target in ("sm_90", "sm_100") else 32
    columns = 32 if not large else 64 if amd or not plain or rows == 32 else 128
    warps = 4 if amd or not large or rows == 32 or target == "sm_90" else 8
    return {"BLOCK_N": rows, "BLOCK_M": columns, "BLOCK_D": depth, "num_warps": warps, "num_stages": 2 if amd else 3}


def product_blocks(dtype: torch.dtype, target: str, rows: int) -> dict[str, int]:
    """Blocks, warps and pipeline stages of the products with the logits' gradient; ``rows`` of the output."""
    amd = target.startswith("gfx")
    if dtype not in (torch.float16, torch.bfloat16):
        return {"BLOCK_R": 32, "BLOCK_D": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    few = rows <= 64
    depth = 64 if target in ("sm_90", "sm_100") else 32
    config = {"BLOCK_R": 64 if few else 128, "BLOCK_D": 128, "BLOCK_K": depth}
    return config | {"num_warps": 4 if few else 8, "num_stages": 2 if amd else 3}


@cache
def _device(device: torch.device) -> tuple[str, int]:
    """Target as in ``cl_kernels.testing.TARGETS``, and the number of processors. In the interpreter: few, to cut small matrices."""
    if device.type != "cuda":
        return "sm_80", 2
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def forward_grid(row_blocks: int, column_blocks: int, N: int, M: int, programs: int) -> tuple[int, int]:
    """Row slots and blocks of columns in a group: about ``programs`` in all, with the least scratch that allows.

    The statistics left behind are slots · M + groups · N, least for slots : groups = N : M. Both products stay of the order of
    programs · block + N + M, however large the matrix.
    """
    balanced = round((programs * N / M) ** 0.5)
    slots = min(row_blocks, max(1, balanced, programs // column_blocks))
    slots = triton.cdiv(row_blocks, triton.cdiv(row_blocks, slots))
    groups = min(column_blocks, max(1, programs // slots))
    return slots, triton.cdiv(column_blocks, groups)


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
        self.target, self.processors = _device(student.device)
        large = self.processors * 64 * 64 <= self.N * self.M
        self.config: dict[str, Any] = tile_blocks(student.dtype, self.target, self.N, plain, large)
        self.row_blocks = triton.cdiv(self.N, self.config["BLOCK_N"])
        self.column_blocks = triton.cdiv(self.M, self.config["BLOCK_M"])
        shape_dependent: dict[str, Any] = {
            "K": self.K,
            "ROWS": rows != 0,
            "COLUMNS": columns != 0,
            "SHARED": shared,
            "MASK_DIAGONAL": mask_diagonal,
            "EVEN": self.D % self.config["BLOCK_D"] == 0,
            "EVEN_T": self.D_T % self.config["BLOCK_D"] == 0,
            "PRECISION": float32_products(student.device),
        }
        self.config |= shape_dependent
        self.logit_scale = logit_scale
        self.scale, self.masked = factor / temperature, MASKED / temperature / log(2)
        self.pointers = (
            self.student,
            self.teacher,
            self.anchors,
            own.contiguous(),
            None if weight is None else weight.contiguous(),
            logit_scale,
        )
        self.sizes = (self.N, self.M, self.D, self.D_T)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.student.device)


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
    """Forward pass in two launches; shapes as in ``cl_kernels/schemas.py``. Scratch: see :func:`forward_grid`, 32 bytes each."""
    p = _Problem(
        student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns, mask_diagonal
    )  # fmt: skip
    N, M, K = p.N, p.M, p.K
    row_stats, column_stats = p.empty(1 + K, N if rows else 0), p.empty(2 + K, M if columns else 0)
    if not rows and not columns:
        return torch.zeros((), dtype=torch.float32, device=student.device), row_stats, column_stats
    slots, blocks = forward_grid(p.row_blocks, p.column_blocks, N, M, max(1, 2 * p.processors // K))
    groups = triton.cdiv(p.column_blocks, blocks)
    stats = triton_merge.STATS.value
    row_parts = p.empty(groups if rows else 0, K, N, stats)
    column_parts = p.empty(slots if columns else 0, K, M, stats)
    row_programs = triton.cdiv(N, MERGE["ROW_BLOCK"]) if rows else 0
    column_programs = triton.cdiv(M, MERGE["COLUMN_BLOCK"]) if columns else 0
    unit = temperature**2 * log(2)
    losses, loss = p.empty(row_programs + column_programs), p.empty()
    programs, rows_of, columns_of = slots * groups * K, p.config["BLOCK_N"], p.config["BLOCK_M"]
    notes, tiles = p.empty(programs, columns_of, stats), p.empty(programs, 2, rows_of, columns_of)
    finished = p.empty(dtype=torch.int32)
    with torch.cuda.device_of(student):
        triton_forward.forward_kernel[(slots, groups, K)](
            *p.pointers, row_parts, column_parts, notes, tiles, finished, *p.sizes, blocks * p.config["BLOCK_M"], p.scale / log(2),
            p.masked, KL=kl, **p.config,
        )  # fmt: skip
        triton_merge.merge_kernel[(row_programs + column_programs,)](
            row_parts, column_parts, row_stats, column_stats, losses, loss, finished, N, M, groups, slots, row_programs,
            rows * unit / N, columns * unit / M, K=K, KL=kl, **MERGE,
        )  # fmt: skip
    return loss, row_stats, column_stats


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
    """Backward pass; shapes as in ``cl_kernels/schemas.py``.

    For every piece of ``SCRATCH`` bytes one launch and one more per gradient, and a last one that finishes those of the student and
    of the scale: three in all for the student's where the matrix is small.
    """
    p = _Problem(
        student, teacher, anchors, teacher_anchors, weight, logit_scale, factor, temperature, rows, columns, mask_diagonal
    )  # fmt: skip
    N, M, D, size = p.N, p.M, p.D, student.element_size()
    grad_student = torch.empty(student.shape if need_student else (0,), dtype=student.dtype, device=student.device)
    grad_anchors = torch.empty(anchors.shape if need_anchors else (0,), dtype=anchors.dtype, device=anchors.device)
    grad_scale = p.empty() if need_scale else p.empty(0)
    # The logits' gradient is held in the features' dtype: as numbers around 1, whatever N and M, so that fp16 does not lose them.
    row_factor, column_factor = rows * temperature / N, columns * temperature / M
    unit = max(abs(row_factor), abs(column_factor)) or 1.0
    outer = unit * temperature
    block = p.config["BLOCK_M"]
    pieces = triton.cdiv(M, max(1, min(WIDEST, SCRATCH // ((N + D) * size)) // block) * block)
    width = triton.cdiv(triton.cdiv(M, pieces), block) * block
    g, finished = p.empty(N, width, dtype=student.dtype), p.empty(dtype=torch.int32)
    rest = {"EVEN": D % 128 == 0, "PRECISION": p.config["PRECISION"]}
    of_student = product_blocks(student.dtype, p.target, N)
    of_anchors = product_blocks(student.dtype, p.target, width)
    tiles = triton.cdiv(N, of_student["BLOCK_R"]), triton.cdiv(D, of_student["BLOCK_D"])
    inner_blocks = triton.cdiv(width, of_student["BLOCK_K"])
    split = triton.cdiv(inner_blocks, max(1, p.processors // (tiles[0] * tiles[1]))) * of_student["BLOCK_K"]
    splits = triton.cdiv(width, split)
    with_student = need_student or need_scale
    parts = p.empty(splits if with_student else 0, N, D)
    with torch.cuda.device_of(student):
        for first in range(0, M, width):
            inner = min(width, M - first)
            triton_gradient.gradient_kernel[(p.row_blocks, width // block)](
                *p.pointers, row_stats.contiguous(), column_stats.contiguous(), g, finished, *p.sizes, first, width,
                p.scale / log(2), row_factor / unit, column_factor / unit, **p.config,
            )  # fmt: skip
            if with_student:
                triton_gradient.product_kernel[(tiles[1] * tiles[0], splits)](
                    g, p.anchors[first:], parts, grad, logit_scale, N, width, inner, D, width, split, outer * p.scale,
                    first // width, TRANSPOSED=False, **rest, **of_student,
                )  # fmt: skip
            if need_anchors:
                blocks = triton.cdiv(D, of_anchors["BLOCK_D"]) * triton.cdiv(inner, of_anchors["BLOCK_R"])
                triton_gradient.product_kernel[blocks, 1](
                    g, p.student, grad_anchors[first:], grad, logit_scale, inner, N, N, D, width, N, outer * p.scale,
                    0, TRANSPOSED=True, **rest, **of_anchors,
                )  # fmt: skip
        if with_student:
            programs = triton.cdiv(N * D, FINISH["BLOCK"])
            triton_gradient.finish_kernel[(programs,)](
                grad, p.student, logit_scale, parts, grad_student if need_student else None,
                p.empty(programs) if need_scale else None, grad_scale if need_scale else None, finished, splits, N * D,
                p.scale, outer, unit * factor, **FINISH,
            )  # fmt: skip
    return grad_student, grad_anchors, grad_scale

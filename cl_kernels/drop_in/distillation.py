"""The mean distillation of logits with gradients in both sides, as one operation each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.distill_kl import distill_kl
from cl_kernels.distill_kl.reference import compute_dtype


def distillation(t: Tensor, s: Tensor, temperature: float) -> Tensor:
    """``T² / rows · Σ −softmax(t / T) log_softmax(s / T)`` along dim 1, in the dtype of ``s``; differentiable in both sides.

    On a CPU with the compiled library it is one operation forward and one backward; elsewhere the student's side runs through
    :func:`cl_kernels.distill_kl` and the teacher's through plain PyTorch.

    Args:
        t: the teacher's logits (N, M, …), any strides.
        s: the student's, of the same shape, dtype and device.
        temperature: ``T > 0``.

    Source: ZSCL (Zheng et al., ICCV 2023), section 3.2 and its public code.
    """
    if compiled(s):
        return _Distillation.apply(t, s, temperature)
    loss = distill_kl(s, t, temperature=temperature, dim=1)
    if t.requires_grad and torch.is_grad_enabled():
        loss = loss + _TeacherGradient.apply(t, s.detach(), temperature)
    return loss.to(s.dtype)


def compiled(s: Tensor) -> bool:
    """Whether the compiled library takes such logits.

    Args:
        s: the student's, of any shape.
    """
    return (
        s.device.type == "cpu"
        and dispatch.choose("distill_kl", s.device) == "cpu"
        and library.has_kernel(library.COMPILED, "distillation", "CPU")
    )


class _Distillation(torch.autograd.Function):
    """The compiled operation; where the gradient is to be differentiated again, its formula in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, s: Tensor, temperature: float) -> Tensor:
        loss, stats = library.operator("distillation", "cpu")(t, s, temperature)
        ctx.save_for_backward(t, s, stats)
        ctx.temperature = temperature
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        t, s, stats = ctx.saved_tensors
        need_t, need_s, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            of_t, of_s = _gradients(grads[0], t, s, ctx.temperature)
        else:
            of_t, of_s = library.operator("distillation_backward", "cpu")(
                grads[0], t, s, stats, ctx.temperature, need_t, need_s
            )
        return of_t if need_t else None, of_s if need_s else None, None


def _gradients(grad: Tensor, t: Tensor, s: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both gradients by operations that can be differentiated again."""
    log_p_s = (s / temperature).log_softmax(1)
    p_t = (t / temperature).softmax(1)
    mean = (p_t * log_p_s).sum(1, keepdim=True)
    factor = grad * (temperature * t.shape[1] / max(1, t.numel()))
    return factor * p_t * (mean - log_p_s), factor * (log_p_s.exp() - p_t)


class _TeacherGradient(torch.autograd.Function):
    """Zero, with the gradient of the distillation in the teacher's logits: ``T / rows · p_t (Σ p_t log p_s − log p_s)``."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, s: Tensor, T: float) -> Tensor:
        ctx.save_for_backward(t, s)
        ctx.temperature = T
        return t.new_zeros((), dtype=torch.promote_types(t.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        t, s = ctx.saved_tensors
        T = ctx.temperature
        rows, dim = t.numel() // t.shape[1], 1
        turned = t.dim() == 2 and t.stride(0) == 1 and s.stride(0) == 1
        if turned:  # along the rows as they lie in memory: over dim 1 torch would copy them first
            t, s, dim = t.t(), s.t(), 0
        log_p_s = (s / T).log_softmax(dim)
        p_t = (t / T).softmax(dim)
        # p_t (log p_s − Σ p_t log p_s), as of a softmax whose incoming gradient is log p_s
        found = torch.ops.aten._softmax_backward_data(log_p_s, p_t, dim, p_t.dtype)
        found = found.mul_(grads[0] * (-T / rows)).to(t.dtype)
        return found.t() if turned else found, None, None


def _fake(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    slices = student.numel() // student.shape[1]
    return student.new_empty(()), student.new_empty(4, slices, dtype=compute_dtype(student.dtype))


def _fake_backward(
    grad: Tensor,
    teacher: Tensor,
    student: Tensor,
    stats: Tensor,
    temperature: float,
    need_teacher: bool,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    rows_together = all(side.stride(1) == 1 or side.shape[1] == 1 for side in (teacher, student))
    columns_together = teacher.stride(0) == 1 and student.stride(0) == 1 and student.shape[0] > 1

    def empty(needed: bool) -> Tensor:
        if not needed:
            return student.new_empty(0)
        if student.dim() == 2 and columns_together and not rows_together:
            return student.new_empty(student.shape[::-1]).t()
        return student.new_empty(student.shape)

    return empty(need_teacher), empty(need_student)


_library = library.definitions[library.COMPILED]
_library._register_fake("distillation", _fake)
_library._register_fake("distillation_backward", _fake_backward)

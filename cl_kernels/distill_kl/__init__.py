"""Distillation between similarity matrices, from logits and from features."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.distill_kl import autograd, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TARGETS = ("cross_entropy", "kl")
_REDUCTIONS = ("mean", "sum", "none")


def distill_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    dim: int = -1,
    target: str = "cross_entropy",
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    overwrite_student: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Distillation from logits: ``T² Σ_j −p_t[j] log p_s[j]`` along ``dim``, with ``p = softmax(logits / T)``.

    ``target="kl"`` adds ``Σ_j p_t[j] log p_t[j]``: the Kullback–Leibler divergence, with the same gradient. Entries with
    ``p_t = 0`` count as 0, so logits that are -inf on both sides drop out. A slice that is -inf throughout gives NaN.

    Args:
        student_logits: any shape with at least one dimension, such as (N, M); float32, float64, bfloat16 or float16. Arithmetic
            is fp32 (fp64 for float64). Differentiable.
        teacher_logits: the same shape and device, any of these dtypes; never differentiated.
        temperature: ``T > 0``.
        dim: the dimension of the softmax: -1 for images against texts, -2 for texts against images.
        target: ``"cross_entropy"`` (as ZSCL) or ``"kl"``.
        sample_weight: broadcasts to the shape without ``dim`` and multiplies the losses there; differentiable.
        reduction: ``"none"`` keeps that shape; ``"sum"``; ``"mean"`` is the plain mean of ``weight · loss`` (NaN over nothing, as
            in :func:`torch.nn.functional.cross_entropy`).
        overwrite_student: the backward pass may write the gradient where the student's logits are, which saves a tensor of their
            size. Nobody may read them afterwards; autograd raises where another operation has kept them for its own backward pass.
            Logits that are not contiguous, ``torch.compile`` and the reference get memory of its own all the same.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Returns:
        float32 (float64 for float64 students), a scalar or the shape without ``dim``. Gradients have the input's dtype.

    Raises:
        ValueError: shapes or devices differ, ``dim`` is out of range or empty, an option is unknown, ``temperature`` is not a
            positive number, ``sample_weight`` does not broadcast, a leaf is to be overwritten, or the backend cannot run.
        TypeError: an argument is not a tensor of one of those dtypes.

    Source: Hinton et al., 2015; ZSCL (Zheng et al., 2023), section 3.2.
    """
    student, teacher = student_logits, teacher_logits
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        _check_tensor(name, tensor)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits is {tuple(teacher.shape)}, student_logits is {tuple(student.shape)}: expected the same shape"
        )
    _check_device("teacher_logits", teacher, "student_logits", student)
    _check_options(temperature, target)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")
    if not -student.dim() <= dim < student.dim():
        raise ValueError(f"dim: got {dim}, but student_logits is {tuple(student.shape)}")
    dim %= student.dim()
    left = student.shape[:dim] + student.shape[dim + 1 :]
    if student.shape[dim] == 0:
        raise ValueError(f"student_logits is {tuple(student.shape)}: nothing to distil along dim {dim}")
    if sample_weight is not None:
        _check_weight(sample_weight, left, f"without dim {dim} of student_logits {tuple(student.shape)}")
        _check_device("sample_weight", sample_weight, "student_logits", student)

    if overwrite_student and student.is_leaf and student.requires_grad:
        raise ValueError(
            f"overwrite_student: student_logits {tuple(student.shape)} is a leaf, whose values and gradient are both kept: "
            "expected the result of an operation"
        )

    chosen = dispatch.choose("distill_kl", student.device, backend)
    if chosen == "reference":
        loss = reference.distill_kl(student, teacher, temperature, dim, target == "kl")
    else:
        options = (float(temperature), dim, target == "kl", overwrite_student)
        loss = autograd.distill_kl(chosen, student, teacher.detach(), *options)
    if sample_weight is not None:
        loss = loss * sample_weight.to(loss.dtype)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def feature_distill_kl(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    *,
    logit_scale: Tensor | float,
    temperature: float = 2.0,
    rows: float = 1.0,
    columns: float = 1.0,
    target: str = "cross_entropy",
    teacher_anchors: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask_diagonal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Distillation from features, in both directions: ``rows · KD(Z_t, Z_s) + columns · KD(Z_tᵀ, Z_sᵀ)``.

    ``Z = logit_scale · f anchorsᵀ`` is (N, M) and never held: both directions come from tiles of it, which the gradient recomputes
    from the log-sum-exps (the CPU kernel keeps tiles inside the call instead, within 20 MiB, the Triton kernels up to 24 MiB of
    the gradient of ``Z``). With weights ``w``, teachers ``k`` and ``p = softmax(Z / T)``::

        rows    · T² · 1/N Σ_n Σ_k Σ_m −w[k,n] p_t[k,n,m] log p_s[n,m]      softmax over m
        columns · T² · 1/M Σ_m Σ_k Σ_n −w[k,n] p_t[k,n,m] log p_s[n,m]      softmax over n

    Features are used as given: normalise them first where the method does. Inputs of different dtypes are computed in the
    widest of them. ``target="kl"`` subtracts the teachers' entropy.

    Args:
        student: (N, d) features; float32, float64, bfloat16 or float16. Products of 16-bit features accumulate in fp32.
        teacher: (N, d) or, for K teachers, (K, N, d); never differentiated.
        anchors: (M, d) features of the other modality, usually the teacher's text features, shared by student and teacher.
        logit_scale: the factor itself, not its logarithm: a number or a 0-d tensor, the same for student and teacher;
            differentiated through the student only.
        temperature: ``T > 0``.
        rows: factor of the image direction, softmax over the anchors.
        columns: factor of the text direction, softmax over the N images.
        target: ``"cross_entropy"`` (as ZSCL) or ``"kl"``.
        teacher_anchors: (M, d_t) anchors of the teachers where they differ from the student's; never differentiated. With them,
            the teachers' width ``d_t`` may differ from ``d``.
        sample_weight: (N,) or (K, N), default 1; a constant, never differentiated.
        mask_diagonal: both logits ``Z[n, n]`` become -1e4: the relation among images, with ``anchors=student`` and
            ``teacher_anchors=teacher``.
        backend: see :func:`cl_kernels.backends`; chosen by device when None. ``"triton"`` has no float64 products: such features
            run on the reference on CUDA, with a warning.

    Returns:
        0-d tensor, float32 (float64 for float64 inputs). Differentiable in ``student``, ``anchors`` and a tensor
        ``logit_scale``; gradients have the input's dtype.

    Raises:
        ValueError: shapes or devices do not fit, N or M is 0, an option is unknown, or the backend cannot run.
        TypeError: an argument is not a tensor of one of those dtypes.

    Source: ZSCL (Zheng et al., 2023), equations 2 to 4.
    """
    for name, tensor in (("student", student), ("teacher", teacher), ("anchors", anchors)):
        _check_tensor(name, tensor)
    if teacher_anchors is not None:
        _check_tensor("teacher_anchors", teacher_anchors)
    _check_features(student, teacher, anchors, teacher_anchors)
    _check_options(temperature, target)
    for name, value in (("rows", rows), ("columns", columns)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: got {value}, expected a finite number")
    K = teacher.shape[0] if teacher.dim() == 3 else 1
    N = student.shape[0]
    if sample_weight is not None:
        _check_tensor("sample_weight", sample_weight)
        if sample_weight.shape not in ((N,), (K, N)):
            raise ValueError(
                f"sample_weight is {tuple(sample_weight.shape)}, teacher is {tuple(teacher.shape)}: expected ({N},) or ({K}, {N})"
            )
        _check_device("sample_weight", sample_weight, "student", student)
    logit_scale = _scale(logit_scale, student)

    dtypes = [t.dtype for t in (student, teacher, anchors, teacher_anchors) if t is not None]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    student, teacher, anchors = student.to(dtype), teacher.detach().to(dtype), anchors.to(dtype)
    teacher = teacher if teacher.dim() == 3 else teacher[None]
    weight = None if sample_weight is None else sample_weight.detach().expand(K, N)
    if teacher_anchors is not None:
        teacher_anchors = teacher_anchors.detach().to(dtype)

    chosen = _without_double(dispatch.choose("feature_distill_kl", student.device, backend), backend, dtype)
    options = (float(temperature), float(rows), float(columns), target == "kl", mask_diagonal)
    if chosen == "reference":
        shared = anchors if teacher_anchors is None else teacher_anchors
        return reference.feature_distill_kl(student, teacher, anchors, shared, weight, logit_scale, *options)
    return autograd.feature_distill_kl(
        chosen, student, teacher, anchors, teacher_anchors, weight, logit_scale, *options
    )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: got {given}, expected a float32, float64, bfloat16 or float16 tensor")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}: expected one device")


def _check_options(temperature: float, target: str) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if target not in _TARGETS:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(_TARGETS)}")


def _check_weight(weight: Tensor, shape: torch.Size, where: str) -> None:
    _check_tensor("sample_weight", weight)
    fits = weight.dim() <= len(shape) and all(
        w in (1, n) for w, n in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"sample_weight is {tuple(weight.shape)}: expected a shape that broadcasts to {tuple(shape)}, what is left {where}"
        )


def _check_features(student: Tensor, teacher: Tensor, anchors: Tensor, teacher_anchors: Tensor | None) -> None:
    if student.dim() != 2 or student.shape[0] == 0:
        raise ValueError(f"student is {tuple(student.shape)}: expected (N, d) with at least one row")
    N, d = student.shape
    if anchors.dim() != 2 or anchors.shape[1] != d:
        raise ValueError(f"anchors is {tuple(anchors.shape)}, student is {(N, d)}: expected (M, {d})")
    if anchors.shape[0] == 0 or d == 0:
        raise ValueError(f"anchors is {tuple(anchors.shape)}: nothing to distil against")
    if teacher.dim() not in (2, 3) or teacher.shape[-2] != N or (teacher.dim() == 3 and teacher.shape[0] == 0):
        raise ValueError(f"teacher is {tuple(teacher.shape)}, student is {(N, d)}: expected ({N}, d) or (K, {N}, d)")
    if teacher_anchors is None:
        if teacher.shape[-1] != d:
            raise ValueError(
                f"teacher is {tuple(teacher.shape)}, anchors is {tuple(anchors.shape)}: expected the same last dimension, "
                "or teacher_anchors of the teacher's own"
            )
    elif teacher_anchors.shape != (anchors.shape[0], teacher.shape[-1]) or teacher.shape[-1] == 0:
        raise ValueError(
            f"teacher_anchors is {tuple(teacher_anchors.shape)}, anchors is {tuple(anchors.shape)} and teacher "
            f"{tuple(teacher.shape)}: expected ({anchors.shape[0]}, {teacher.shape[-1]})"
        )
    for name, tensor in (("teacher", teacher), ("anchors", anchors), ("teacher_anchors", teacher_anchors)):
        if tensor is not None:
            _check_device(name, tensor, "student", student)


def _scale(logit_scale: Tensor | float, student: Tensor) -> Tensor | float:
    """A number, or a 0-d tensor on the features' device."""
    if not isinstance(logit_scale, Tensor):
        return float(logit_scale)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale is {tuple(logit_scale.shape)}: expected a number or a 0-d tensor")
    _check_tensor("logit_scale", logit_scale)
    if logit_scale.device != student.device:
        if logit_scale.device.type != "cpu" or logit_scale.requires_grad:
            _check_device("logit_scale", logit_scale, "student", student)
        return float(logit_scale)
    return logit_scale.reshape(())


def _without_double(chosen: str, asked: str | None, dtype: torch.dtype) -> str:
    """Triton's matrix products have no portable float64: such inputs are for checking, and run on the reference."""
    if chosen != "triton" or dtype != torch.float64:
        return chosen
    if asked == "triton":
        raise ValueError("backend='triton' cannot run feature_distill_kl on float64 features; use backend='reference'")
    warnings.warn(
        "cl_kernels: feature_distill_kl runs on its plain PyTorch reference for float64 features on CUDA",
        RuntimeWarning,
        stacklevel=3,
    )
    return "reference"

"""Registrations of distillation: fake implementations, gradients and the Triton kernels, behind the functions that call them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.distill_kl.reference import compute_dtype


def distill_kl(
    backend: str, student: Tensor, teacher: Tensor, temperature: float, dim: int, kl: bool, overwrite: bool
) -> Tensor:
    """The loss of every slice along ``dim``; the kernels see (outer, M, inner) views of the logits.

    Compilers plan memory themselves, so what they trace does not overwrite.
    """
    left = student.shape[:dim] + student.shape[dim + 1 :]
    shape = (student.shape[:dim].numel(), student.shape[dim], student.shape[dim + 1 :].numel())
    s, t = student.reshape(shape), teacher.reshape(shape)
    if shape[2] == 1 and s.stride(1) != 1 and s.stride(0) == 1:  # a transposed matrix: keep its unit stride innermost
        s, t = s.permute(2, 1, 0), t.permute(2, 1, 0)
    overwrite = overwrite and s.is_contiguous() and not torch.compiler.is_compiling()
    loss, _ = library.operator("distill_kl_overwriting" if overwrite else "distill_kl", backend)(s, t, temperature, kl)
    return loss.reshape(left)


def feature_distill_kl(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    teacher_anchors: Tensor | None,
    weight: Tensor | None,
    logit_scale: Tensor | float,
    *options: Any,
) -> Tensor:
    """The loss; ``teacher`` is (K, N, d_t), ``weight`` (K, N), ``options`` as in the schema.

    On the CPU the gradients come with the loss: what they need is at hand by then, and would have to be recomputed later.
    """
    dtype = compute_dtype(student.dtype)
    tensor, factor = (logit_scale, 1.0) if isinstance(logit_scale, Tensor) else (None, logit_scale)
    weight = None if weight is None else weight.to(dtype)
    now = backend == "cpu" and torch.is_grad_enabled()
    wanted = student.requires_grad or (tensor is not None and tensor.requires_grad)
    loss, *_ = library.operator("feature_distill_kl", backend)(
        student,
        teacher,
        anchors,
        teacher_anchors,
        weight,
        tensor,
        factor,
        *options,
        now and wanted,
        now and anchors.requires_grad,
    )
    return loss


def _fake(student: Tensor, teacher: Tensor, temperature: float, kl: bool) -> tuple[Tensor, Tensor]:
    outer, _, inner = student.shape
    dtype = compute_dtype(student.dtype)
    return student.new_empty(outer, inner, dtype=dtype), student.new_empty(4, outer, inner, dtype=dtype)


def _fake_backward(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _fake_overwrite(grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float) -> None:
    return None


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    student, teacher, temperature, _ = inputs
    ctx.save_for_backward(student, teacher, output[1])
    ctx.temperature = temperature


def _backward_of(namespace: str, overwrite: bool) -> Any:
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
        operations = getattr(torch.ops, namespace)
        if not overwrite:
            gradient = operations.distill_kl_backward.default(grad, *ctx.saved_tensors, ctx.temperature)
            return gradient, None, None, None
        student, *others = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            operations.distill_kl_backward_.default(grad, student, *others, ctx.temperature)
        torch.autograd.graph.increment_version(student)  # whoever has kept the logits is told
        return student.detach(), None, None, None

    return backward


def _feature_fake(
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
    need_student: bool = False,
    need_anchors: bool = False,
) -> tuple[Tensor, ...]:
    K, N, _ = teacher.shape
    dtype = compute_dtype(student.dtype)
    statistics = not (need_student or need_anchors)
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(1 + K, N if rows and statistics else 0, dtype=dtype),
        student.new_empty(2 + K, anchors.shape[0] if columns and statistics else 0, dtype=dtype),
        student.new_empty(student.shape if need_student else (0,), dtype=dtype),
        student.new_empty(anchors.shape if need_anchors else (0,), dtype=dtype),
    )


def _feature_fake_backward(
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
    def gradient(needed: bool, of: Tensor) -> Tensor:
        return torch.empty(of.shape if needed else (0,), dtype=of.dtype, device=of.device)

    scale = row_stats.new_empty(() if need_scale else (0,))
    return gradient(need_student, student), gradient(need_anchors, anchors), scale


def _feature_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, factor, temperature, rows, columns, _, mask_diagonal, need_student, need_anchors = inputs
    ctx.options = factor, temperature, rows, columns, mask_diagonal
    ctx.with_loss = need_student or need_anchors
    if ctx.with_loss:
        student, logit_scale = tensors[0], tensors[5]
        ctx.dtype = student.dtype
        ctx.save_for_backward(*output[3:], logit_scale, student if ctx.needs_input_grad[5] else None)
    else:
        ctx.save_for_backward(*tensors, *output[1:3])


def _scaled(ctx: Any, grad: Tensor) -> tuple:
    """The gradients from those that came with the loss."""
    of_student, of_anchors, logit_scale, student = ctx.saved_tensors
    upstream = grad * ctx.options[0]
    scale = upstream if logit_scale is None else upstream * logit_scale.to(grad.dtype)
    needs = ctx.needs_input_grad
    return (
        (of_student * scale).to(ctx.dtype) if needs[0] else None,
        None,
        (of_anchors * scale).to(ctx.dtype) if needs[2] else None,
        *[None] * 2,
        ((of_student * student).sum() * upstream).to(logit_scale.dtype) if needs[5] else None,
        *[None] * 8,
    )


def _feature_backward_of(namespace: str) -> Any:
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
        if ctx.with_loss:
            return _scaled(ctx, grad)
        operation = getattr(torch.ops, namespace).feature_distill_kl_backward.default
        student, _, anchors, _, _, logit_scale, *_ = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 5)]
        gradients = operation(grad, *ctx.saved_tensors, *ctx.options, *needs)
        student, anchors, scale = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        if scale is not None:
            scale = scale.to(logit_scale.dtype)
        return student, None, anchors, None, None, scale, *[None] * 8

    return backward


for _namespace in (library.COMPILED, library.TRITON):
    _library = library.definitions[_namespace]
    for _name, _function in (
        ("distill_kl", _fake),
        ("distill_kl_overwriting", _fake),
        ("distill_kl_backward", _fake_backward),
        ("distill_kl_backward_", _fake_overwrite),
        ("feature_distill_kl", _feature_fake),
        ("feature_distill_kl_backward", _feature_fake_backward),
    ):
        _library._register_fake(_name, _function)
    for _name, _overwrite in (("distill_kl", False), ("distill_kl_overwriting", True)):
        torch.library.register_autograd(
            f"{_namespace}::{_name}", _backward_of(_namespace, _overwrite), setup_context=_setup, lib=_library
        )
    torch.library.register_autograd(
        f"{_namespace}::feature_distill_kl",
        _feature_backward_of(_namespace),
        setup_context=_feature_setup,
        lib=_library,
    )


def _triton(module: str, name: str) -> Any:
    name = name.removesuffix("_overwriting")  # which differs in its backward pass

    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"cl_kernels.distill_kl.{module}"), name)(*arguments)

    return run


def _triton_features(*arguments: Any) -> Any:
    """Without gradients: the backward pass has kernels of its own there."""
    found = _triton("triton_launch", "feature_distill_kl")(*arguments[:12])
    return *found, *(found[0].new_empty(0) for _ in range(2))


for _module, _name in (
    ("triton_kernels", "distill_kl"),
    ("triton_kernels", "distill_kl_overwriting"),
    ("triton_kernels", "distill_kl_backward"),
    ("triton_kernels", "distill_kl_backward_"),
    ("triton_launch", "feature_distill_kl_backward"),
):
    for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
        library.definitions[library.TRITON].impl(_name, _triton(_module, _name), _key)
for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("feature_distill_kl", _triton_features, _key)

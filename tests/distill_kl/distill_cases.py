"""Inputs and checks that every implementation of distillation is held to."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import cl_kernels as clk
from cl_kernels import library

INFINITY = float("inf")
LOGITS = [
    ((5, 7), -1),
    ((5, 7), 0),
    ((1, 9), -1),
    ((3, 1), -1),
    ((4, 3, 17), 1),
    ((2, 131, 3), -2),
    ((13,), 0),
    ((0, 4), -1),
]
"""(shape, dim) of logits: both directions, one row, one column, batches, a vector, nothing."""

FEATURES = [
    {"N": 5, "M": 7, "d": 16},
    {"N": 1, "M": 1, "d": 3},
    {"N": 33, "M": 70, "d": 24, "K": 2, "weighted": True, "target": "kl"},
    {"N": 70, "M": 9, "d": 5, "own": 3, "rows": 0.7, "columns": 1.3},
    {"N": 20, "M": 20, "d": 8, "own": 0, "mask_diagonal": True, "columns": 0.0},
    {"N": 18, "M": 150, "d": 64, "rows": 0.0, "weighted": True},
    {"N": 6, "M": 40, "d": 8, "rows": 0.0, "columns": 0.0},
]
"""Ragged sizes, several teachers with weights, teachers of another width, the masked relation, one direction alone, none."""


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


def close(found, expected, limit, rounding=0.0):
    """Largest difference beyond ``rounding``, over the largest expected value (at least 1e-6, where rounding is all there is)."""
    assert found.shape == expected.shape
    if expected.numel():
        difference = ((found.double() - expected.double()).abs().max() - rounding).clamp_min(0)
        error = difference / expected.double().abs().max().clamp_min(1e-6)
        assert error <= limit, float(error)


def logits(shape, dtype=torch.float32, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * spread).to(dtype) for _ in range(2))


def loss_and_gradient(student, teacher, **options):
    student = student.detach().clone().requires_grad_()  # keeps the strides
    loss = clk.distill_kl(student, teacher, **options)
    upstream = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape).cos()
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def check_logits(backend, shape, dim, dtype, target, reduction="none"):
    if reduction == "mean" and 0 in shape:
        return
    student, teacher = logits(shape, dtype)
    options = {"temperature": 1.7, "dim": dim, "target": target, "reduction": reduction}
    loss, gradient = loss_and_gradient(student, teacher, backend=backend, **options)
    exact, exact_gradient = loss_and_gradient(student.double(), teacher.double(), backend="reference", **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    close(loss, exact, tolerance(torch.float64 if dtype == torch.float64 else torch.float32))
    close(gradient, exact_gradient, tolerance(dtype))


def check_long_rows(backend, M):
    """More entries than any block holds."""
    student, teacher = logits((2, M))
    loss, gradient = loss_and_gradient(student, teacher, backend=backend, target="kl")
    exact, exact_gradient = loss_and_gradient(student.double(), teacher.double(), backend="reference", target="kl")
    close(loss, exact, 1e-5)
    close(gradient, exact_gradient, 1e-5)


def check_extremes(backend):
    """±1e4, entries that are -inf on both sides, a student that excludes what the teacher believes, NaN, a slice of -inf."""
    student, teacher = logits((8, 40), spread=1e4 / 3)
    student[1], teacher[1] = 1e4, -1e4
    student[2, ::2] = teacher[2, ::2] = -INFINITY
    student[3, :39] = teacher[3, :39] = -INFINITY
    teacher[4], student[4, 5], teacher[4, 5] = 0.0, -INFINITY, 10.0
    student[5, 7] = float("nan")
    teacher[6] = -INFINITY
    student[7], teacher[7] = 1e4, 1e4
    for transposed in (False, True):
        for target in ("cross_entropy", "kl"):
            given = (student.T, teacher.T) if transposed else (student, teacher)
            options = {"dim": 0 if transposed else 1, "target": target, "reduction": "none"}
            loss, gradient = loss_and_gradient(*given, backend=backend, **options)
            exact, exact_gradient = loss_and_gradient(*(t.double() for t in given), backend="reference", **options)
            finite = exact.isfinite()
            assert finite.tolist() == [True, True, True, True, False, False, False, True]
            torch.testing.assert_close(
                loss.double(), exact, rtol=1e-5, atol=2e-3 if target == "kl" else 1e-4, equal_nan=True
            )
            torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-4, atol=2e-5, equal_nan=True)
            assert loss[4] == INFINITY


def check_views(backend):
    """Transposed, strided and expanded logits, and teachers of another dtype and layout."""
    student, teacher = logits((6, 10, 8))
    for view in (
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2, 1::3],
        lambda t: t[:1].expand(4, 10, 8),
        lambda t: t[..., 0].T,
        lambda t: t[:, 3],
    ):
        for dim in (0, -1):
            loss, gradient = loss_and_gradient(view(student), view(teacher), dim=dim, backend=backend)
            dense = [view(t).contiguous() for t in (student, teacher)]
            exact, exact_gradient = loss_and_gradient(*dense, dim=dim, backend=backend)
            torch.testing.assert_close(loss, exact)
            torch.testing.assert_close(gradient, exact_gradient)
            mixed, _ = loss_and_gradient(view(student), dense[1].double(), dim=dim, backend=backend)
            torch.testing.assert_close(mixed, exact)


def check_overwriting(backend):
    """The gradient has the same bits and lies where the logits were; autograd notices who still needed them."""
    for dtype in (torch.float32, torch.float16):
        for shape, dim in (((5, 70), 1), ((5, 70), 0), ((2, 70, 3), 1), ((2, 2100), -1), ((3, 1), 1)):
            for spread in (4.0, 400.0):  # within the bounds of the short way, and partly beyond
                leaf, teacher = logits(shape, dtype, spread)
                results = []
                for overwrite in (False, True):
                    leaf = leaf.detach().requires_grad_()
                    student = leaf * 1
                    options = {"dim": dim, "reduction": "sum", "overwrite_student": overwrite, "backend": backend}
                    loss = clk.distill_kl(student, teacher, **options)
                    gradient = torch.autograd.grad(loss, student, retain_graph=True)[0]
                    assert (gradient.data_ptr() == student.data_ptr()) == overwrite
                    results.append((loss.detach(), gradient))
                for plain, overwritten in zip(*results, strict=True):
                    assert torch.equal(plain, overwritten)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
    student = (logits((5, 14))[0].requires_grad_() * 1)[:, ::2]  # not contiguous
    before = student.detach().clone()
    clk.distill_kl(student, before, overwrite_student=True, backend=backend).backward()
    assert torch.equal(student, before)
    student = before.clone().requires_grad_() * 1
    kept = student.square().sum()  # another loss, which needs the logits in its backward pass
    loss = clk.distill_kl(student, before, overwrite_student=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept + loss).backward()
    with pytest.raises(ValueError, match=r"overwrite_student: student_logits .* is a leaf"):
        clk.distill_kl(before.requires_grad_(), before.detach(), overwrite_student=True, backend=backend)


def check_weights(backend):
    """The mean of weight · loss, with gradients for the weights, which broadcast."""
    student, teacher = logits((4, 5, 6))
    for shape in ((4, 5), (5,), (4, 1), ()):
        weight = torch.rand(shape, requires_grad=True)
        plain = clk.distill_kl(student, teacher, reduction="none", backend=backend)
        for reduction in ("mean", "sum", "none"):
            loss = clk.distill_kl(student, teacher, sample_weight=weight, reduction=reduction, backend=backend)
            expected = plain * weight
            torch.testing.assert_close(loss, expected if reduction == "none" else getattr(expected, reduction)())
        assert torch.autograd.grad(loss.sum(), weight)[0].shape == shape


def features(N, M, d, K=None, own=None, weighted=False, dtype=torch.float32, seed=0, **options):
    """Arguments and keywords of feature_distill_kl; ``own`` teacher anchors are that much wider than d."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype)

    student, anchors = unit(N, d), unit(M, d)
    width = d + (own or 0)
    teacher = unit(*(() if K is None else (K,)), N, width)
    keywords = {"temperature": 2.0, "teacher_anchors": None if own is None else unit(M, width)} | options
    if weighted:
        keywords["sample_weight"] = torch.rand((N,) if K is None else (K, N), generator=generator)
    return student, teacher, anchors, keywords


def feature_gradients(student, teacher, anchors, keywords, backend, scale=20.0, fixed_anchors=False):
    """Loss and the gradients of student, anchors (unless fixed) and logit scale."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    leaves = [t.detach().clone().requires_grad_() for t in (student, anchors, torch.tensor(scale, dtype=dtype))]
    if fixed_anchors:
        leaves[1].requires_grad_(False)
    loss = clk.feature_distill_kl(leaves[0], teacher, leaves[1], logit_scale=leaves[2], backend=backend, **keywords)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss * 1.7, wanted, materialize_grads=True)


def in_float64(student, teacher, anchors, keywords):
    keywords = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    return student.double(), teacher.double(), anchors.double(), keywords


def check_features(backend, case, dtype, scale=20.0):
    """Against float64. Rounded logits, up to ``scale``, move the loss and probabilities, of which gradients of features have
    ``scale`` times as much; with one caption nothing else is left."""
    moved = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * scale / case["N"]
    rounding = moved, moved * scale, moved * scale, moved
    given = features(dtype=dtype, **case)
    found = feature_gradients(*given, backend, scale)
    expected = feature_gradients(*in_float64(*given), "reference", scale)
    accurate = tolerance(torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.float16, torch.bfloat16)
    triton = backend == "triton" and half  # tile gradients are held in 16 bits there
    limits = (accurate, *[tolerance(dtype)] * 2, accurate)
    for value, exact, limit, slack in zip(found, expected, limits, rounding, strict=True):
        close(value, exact, tolerance(dtype) if triton and limit == accurate else limit, slack)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == found[2].dtype == dtype
    fixed = feature_gradients(*given, backend, scale, fixed_anchors=True)
    assert fixed[1].dtype == dtype
    for value, other, limit, slack in zip(
        fixed, (found[0], found[1], found[3]), (limits[0], limits[1], limits[3]), (*rounding[:2], moved), strict=True
    ):
        close(value, other, tolerance(dtype) if triton and limit == accurate else limit, slack)


def check_feature_views(backend):
    """Strided features, an expanded upstream gradient, a number as logit scale, mixed dtypes computed in the widest."""
    student, teacher, anchors, keywords = features(9, 30, 8)
    exact = feature_gradients(student, teacher, anchors, keywords, backend)
    wide = [torch.cat([t, t], -1)[:, :8] for t in (student, teacher, anchors)]
    columns = [t.T.contiguous().T for t in (student, teacher, anchors)]
    for given in (wide, columns):
        for a, b in zip(feature_gradients(*given, keywords, backend), exact, strict=True):
            torch.testing.assert_close(a, b)
    number = clk.feature_distill_kl(student, teacher, anchors, logit_scale=20.0, backend=backend)
    torch.testing.assert_close(number, exact[0])
    mixed = clk.feature_distill_kl(student.half(), teacher, anchors, logit_scale=20.0, backend=backend)
    torch.testing.assert_close(mixed, number, rtol=1e-2, atol=0)
    assert mixed.dtype == torch.float32


def check_large_scale(backend, N=8, M=30, d=6, **options):
    """Logits of ±1e4: nothing overflows, and the loss is that of the definition."""
    given = features(N, M, d, **options)
    found, expected = feature_gradients(*given, backend, 1e4), feature_gradients(*in_float64(*given), "reference", 1e4)
    for value, exact in zip(found, expected, strict=True):
        assert value.isfinite().all()
        close(value, exact, 5e-3)


def check_opcheck(backend):
    student, teacher = logits((3, 5, 2))
    operator = library.operator("distill_kl", backend)
    torch.library.opcheck(operator, (student.requires_grad_(), teacher, 2.0, True))
    student, teacher, anchors, keywords = features(6, 9, 4, K=2, own=1, weighted=True)
    scale = torch.tensor(5.0, requires_grad=True)
    leaves = student.requires_grad_(), teacher, anchors.requires_grad_(), keywords["teacher_anchors"]
    options = (1.0, 2.0, 1.0, 0.5, True, False)
    operator = library.operator("feature_distill_kl", backend)
    torch.library.opcheck(operator, (*leaves, keywords["sample_weight"], scale, *options))
    if backend == "cpu":  # without the optional tensors; the interpreter takes its time
        torch.library.opcheck(operator, (leaves[0], teacher[..., :4], leaves[2], None, None, None, *options))
        fixed = leaves[0], teacher, leaves[2].detach(), *leaves[3:], keywords["sample_weight"], scale
        torch.library.opcheck(operator, (*fixed, *options, True, False))
        torch.library.opcheck(operator, (*leaves, keywords["sample_weight"], scale, *options, True, True))


def check_compile(backend):
    student, teacher, anchors, keywords = features(6, 9, 4)

    def run(student, anchors, scale):
        loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=scale, backend=backend, **keywords)
        return loss + clk.distill_kl(student @ anchors.T, teacher @ anchors.T, dim=-2, backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for fixed_anchors in (False, True):
        results = []
        for function in (run, compiled):
            leaves = [t.detach().clone().requires_grad_() for t in (student, anchors, torch.tensor(10.0))]
            wanted = [leaves[0], leaves[2]] if fixed_anchors else leaves
            leaves[1].requires_grad_(not fixed_anchors)
            loss = function(*leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def check_autocast(backend):
    """Autocast changes nothing: the arithmetic is fp32 in any case."""
    student, teacher, anchors, keywords = features(6, 9, 4)
    plain = feature_gradients(student, teacher, anchors, keywords, backend)
    z_s, z_t = logits((4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        under = feature_gradients(student, teacher, anchors, keywords, backend)
        loss = clk.distill_kl(z_s, z_t, backend=backend)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(loss, clk.distill_kl(z_s, z_t, backend=backend))


@contextmanager
def largest_tensor():
    """Yields a list whose only entry becomes the size of the largest tensor that an operation returns or cl_kernels allocates."""
    largest, allocate = [0], torch.empty

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    def empty(*args, **kwargs):  # scratch inside an operator, which the mode does not see
        tensor = allocate(*args, **kwargs)
        largest[0] = max(largest[0], tensor.numel())
        return tensor

    torch.empty = empty
    try:
        with Watch():
            yield largest
    finally:
        torch.empty = allocate


def check_memory(backend, N, M):
    """Neither pass makes, and the graph does not keep, anything of the size of the similarity matrix."""
    student, teacher, anchors, keywords = features(N, M, 4)
    student.requires_grad_()
    anchors.requires_grad_()
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with largest_tensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=9.0, backend=backend, **keywords)
        loss.backward()
    assert 0 < largest[0] <= N * M // 4, largest
    assert sum(saved) <= N * M // 4


def check_operator_errors(backend):
    """The operators refuse what would read out of bounds, for those who call them without the public functions."""
    operator = library.operator("distill_kl", backend)
    with pytest.raises((RuntimeError, ValueError)):
        operator(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1), 2.0, False)
    operator = library.operator("feature_distill_kl", backend)
    options = (1.0, 2.0, 1.0, 1.0, False, False)
    for shapes in (((2, 3), (1, 3, 3), (4, 3)), ((2, 3), (1, 2, 3), (4, 5)), ((2, 3), (1, 2, 4), (4, 3))):
        with pytest.raises((RuntimeError, ValueError)):
            operator(*(torch.zeros(s) for s in shapes), None, None, None, *options)
    with pytest.raises((RuntimeError, ValueError)):
        operator(torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(4, 3), None, torch.zeros(2, 2), None, *options)

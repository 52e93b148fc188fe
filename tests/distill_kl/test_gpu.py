"""Distillation on a GPU: values, no waiting for the device, CUDA graphs, the same bits every time, launches, memory."""

from __future__ import annotations

import distill_cases as cases
import pytest
import torch
from gpu_steps import capture, replayed, waiting_is_an_error

import cl_kernels as clk

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOGITS = [((64, 1000), -1), ((64, 1000), 0), ((3, 70, 5001), 1), ((7, 100_003), -1), ((1, 1), -1), ((0, 4), -1)]
FEATURES = [
    {"N": 64, "M": 1000, "d": 512},
    {"N": 64, "M": 20_000, "d": 512},
    {"N": 256, "M": 10_000, "d": 512, "target": "kl"},
    {"N": 1000, "M": 3001, "d": 768, "weighted": True},
    {"N": 90, "M": 777, "d": 200, "K": 3, "weighted": True, "target": "kl"},
    {"N": 300, "M": 9000, "d": 640, "own": 128, "K": 2, "rows": 0.7, "columns": 1.3},
    {"N": 513, "M": 513, "d": 512, "own": 0, "mask_diagonal": True},
    {"N": 7, "M": 50_000, "d": 512, "columns": 0.0},
    {"N": 5000, "M": 33, "d": 64, "rows": 0.0},
    {"N": 1, "M": 1, "d": 3},
]


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(student, teacher, anchors, keywords):
    keywords = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    return student.cuda(), teacher.cuda(), anchors.cuda(), keywords


def gradients(given, backend="triton", scale=50.0, fixed_anchors=False):
    """Loss and the gradients of the student, the anchors (unless fixed) and the logit scale."""
    student, teacher, anchors, keywords = given
    scale = torch.full(
        (), scale, device="cuda", dtype=torch.float64 if student.dtype == torch.float64 else torch.float32
    )
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (student, anchors, scale)]
    leaves[1].requires_grad_(not fixed_anchors)
    loss = clk.feature_distill_kl(leaves[0], teacher, leaves[1], logit_scale=leaves[2], backend=backend, **keywords)
    return loss.detach(), *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


def assert_equals_float64(given, scale=50.0, limits=None):
    dtype = given[0].dtype
    found, expected = gradients(given, scale=scale), gradients(cases.in_float64(*given), "reference", scale)
    # The products' errors are those of logits of a few dozen; 16-bit gradients pass through a tile rounded to 16 bits.
    of_loss, of_gradients = limits or (1e-5, max(cases.tolerance(dtype), 1e-4))
    for value, exact, limit in zip(found, expected, (of_loss, *[of_gradients] * 3), strict=True):
        cases.close(value, exact, limit)
    assert found[1].dtype == found[2].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_equal_the_definition(case, dtype):
    assert_equals_float64(on_gpu(*cases.features(dtype=dtype, **case)))


@pytest.mark.parametrize("scale", [1e4, -30.0])
def test_scales_of_another_kind(scale):
    """Logits of ±1e4, whose tiles share no level; and the opposite sign."""
    for case in (FEATURES[0], {"N": 600, "M": 3000, "d": 64, "target": "kl"}):
        assert_equals_float64(on_gpu(*cases.features(**case)), scale, limits=(5e-3, 5e-3) if scale > 100 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_the_gradient(dtype, monkeypatch):
    from cl_kernels.distill_kl import triton_launch

    monkeypatch.setattr(triton_launch, "SCRATCH", 1 << 20)
    assert_equals_float64(on_gpu(*cases.features(N=300, M=5000, d=512, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), LOGITS, ids=str)
def test_logits_equal_the_definition(shape, dim, dtype):
    student, teacher = (tensor.cuda() for tensor in cases.logits(shape, dtype))
    for target in ("cross_entropy", "kl"):
        options = {"dim": dim, "target": target, "reduction": "none"}
        loss, gradient = cases.loss_and_gradient(student, teacher, backend="triton", **options)
        exact, exact_gradient = cases.loss_and_gradient(
            student.double(), teacher.double(), backend="reference", **options
        )
        cases.close(loss, exact, 2e-5)
        cases.close(gradient, exact_gradient, cases.tolerance(dtype))


@pytest.mark.parametrize("case", [FEATURES[0], FEATURES[3], FEATURES[5]], ids=str)
def test_same_bits_every_time(case):
    given = on_gpu(*cases.features(dtype=torch.bfloat16, **case))
    for first, second in zip(gradients(given), gradients(given), strict=True):
        assert torch.equal(first, second)


def step_of(dtype=torch.bfloat16, N=64, M=1000):
    """A forward and a backward pass of both operations, and the tensors that they read."""
    student, teacher, anchors, keywords = on_gpu(*cases.features(N, M, 512, dtype=dtype))
    student.requires_grad_()
    anchors.requires_grad_()
    scale = torch.full((), 50.0, device="cuda", requires_grad=True)

    def step():
        loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=scale, **keywords)
        loss = loss + clk.distill_kl(student @ anchors.T, teacher @ anchors.T, dim=-2)
        return loss, *torch.autograd.grad(loss, (student, anchors, scale))

    return step, student


def test_nothing_waits_for_the_device():
    step, _ = step_of()
    step()  # compiles
    with waiting_is_an_error():
        step()


def test_graph_equals_eager():
    step, student = step_of()
    graph, results = capture(step)
    for factor in (1.0, -1.0):  # replays read what is there now
        with torch.no_grad():
            student.mul_(factor)
        for found, wanted in zip(replayed(graph, results), step(), strict=True):
            assert torch.equal(found, wanted)


def kernels_of(call):
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return result, [name for name in names if not name.startswith(("Memset", "Memcpy"))]


def test_number_of_launches():
    student, teacher, anchors, keywords = on_gpu(*cases.features(64, 1000, 512, dtype=torch.bfloat16))
    student.requires_grad_()
    loss, names = kernels_of(lambda: clk.feature_distill_kl(student, teacher, anchors, logit_scale=50.0, **keywords))
    assert len(names) == 2, names
    upstream = torch.ones((), device="cuda")
    _, names = kernels_of(lambda: torch.autograd.grad(loss, student, upstream, retain_graph=True))
    assert len(names) == 3, names


def test_memory_does_not_grow_with_the_matrix():
    """Beside the gradients, tens of megabytes; the student's and the teacher's logits would take 3.2 GB each in fp32."""
    student, teacher, anchors, keywords = on_gpu(*cases.features(4096, 200_000, 64, dtype=torch.bfloat16))
    student.requires_grad_()
    loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=50.0, **keywords)
    torch.autograd.grad(loss, student)
    torch.cuda.synchronize()
    del loss
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(clk.feature_distill_kl(student, teacher, anchors, logit_scale=50.0, **keywords), student)
    assert torch.cuda.max_memory_allocated() - before < 150 << 20

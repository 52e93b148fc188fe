"""The compiled distillation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distill_cases as cases
import pytest
import torch

import cl_kernels as clk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["cross_entropy", "kl"])
@pytest.mark.parametrize(("shape", "dim"), cases.LOGITS, ids=str)
def test_logits_equal_the_definition(shape, dim, target, dtype):
    cases.check_logits("cpu", shape, dim, dtype, target)
    cases.check_logits("cpu", shape, dim, dtype, target, "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FEATURES, ids=str)
def test_features_equal_the_definition(case, dtype):
    cases.check_features("cpu", case, dtype)


def test_several_tasks_per_direction():
    """More rows and columns than one task takes, so that partial results are merged in both directions."""
    cases.check_features("cpu", {"N": 300, "M": 700, "d": 8, "weighted": True, "target": "kl"}, torch.float32)


LARGE = [
    {"N": 130, "M": 200, "d": 48},
    {"N": 67, "M": 300, "d": 40, "K": 2, "weighted": True, "target": "kl"},
    {"N": 200, "M": 1100, "d": 33, "own": 5, "K": 3, "weighted": True},
    {"N": 150, "M": 150, "d": 32, "own": 0, "mask_diagonal": True},
    {"N": 700, "M": 4200, "d": 16, "target": "kl"},
]
"""Several tiles, tasks and row groups; widths read in place and copied; more columns than are kept between the two sweeps."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_features_equal_the_definition(case, dtype):
    cases.check_features("cpu", case, dtype)


@pytest.mark.parametrize("where", ["student", "teacher", "anchors"])
@pytest.mark.parametrize("size", [40.0, -40.0, 1e6, float("nan"), cases.INFINITY])
def test_a_logit_out_of_bounds_anywhere(size, where):
    """One feature takes its logits out of what the kernels for bounded logits can hold: the others must run, unasked."""
    student, teacher, anchors, keywords = cases.features(70, 500, 16)
    given = {"student": student, "teacher": teacher, "anchors": anchors}
    given[where][given[where].shape[0] - 3, 5] = size
    for fixed_anchors in (False, True):
        found = cases.feature_gradients(*given.values(), keywords, "cpu", 10.0, fixed_anchors)
        exact = cases.in_float64(*given.values(), keywords)
        expected = cases.feature_gradients(*exact, "reference", 10.0, fixed_anchors)
        for value, other in zip(found, expected, strict=True):
            if abs(size) < 100:
                cases.close(value, other, 1e-4)
            else:
                assert bool(value.isfinite().all()) == bool(other.isfinite().all())


@pytest.mark.parametrize("scale", [1e-3, 10.0, 120.0, 126.0, 140.0, 1e3])
def test_scales_around_the_bound(scale):
    student, teacher, anchors, keywords = cases.features(20, 110, 16)
    anchors[7], anchors[31] = student[3], -teacher[4]  # the largest cosines there are
    given = student, teacher, anchors, keywords
    found = cases.feature_gradients(*given, "cpu", scale, True)
    expected = cases.feature_gradients(*cases.in_float64(*given), "reference", scale, True)
    for value, exact in zip(found, expected, strict=True):
        cases.close(value, exact, 1e-4)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, forked_torch, tmp_path):
    """Each in its own process, because the choice is made once. Where the machine lacks one, the next lower runs."""
    code = (
        "import torch; import distill_cases as cases, test_cpu\n"
        "test_cpu.check_exponential()\n"
        "cases.check_extremes('cpu')\n"
        "for dtype in test_cpu.DTYPES:\n"
        "    for shape, dim in cases.LOGITS:\n"
        "        cases.check_logits('cpu', shape, dim, dtype, 'kl')\n"
        "    for case in cases.FEATURES + test_cpu.LARGE[:4]:\n"
        "        cases.check_features('cpu', case, dtype)\n"
    )
    here = str(Path(__file__).parent)
    (tmp_path / "program.py").write_text(code)
    done = forked_torch.run(
        tmp_path / "program.py", environment={"CL_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    )
    assert done.returncode == 0, done.stderr


def exponential(x, bounded=False):
    """The kernels' exponential: with a zero teacher, temperature 1 and zero statistics the gradient is exp(student).

    Unless bounded, every other logit is far out of bounds, so that the kernels for all logits run.
    """
    x = x if bounded else torch.stack([x, torch.full_like(x, -1e4)], -1).flatten()
    stats = torch.zeros(4, 1, 1)
    stats[0], stats[1] = (1.0, -1.0) if bounded else (0.0, 0.0)  # a negative rest says which way they came about
    stats[2] = cases.INFINITY
    teacher = torch.zeros_like(x)
    operator = torch.ops.cl_kernels.distill_kl_backward
    found = operator(torch.ones(1, 1), x.reshape(1, -1, 1), teacher.reshape(1, -1, 1), stats, 1.0).flatten()
    return found if bounded else found[::2]


def check_exponential():
    """Within 2 units in the last place everywhere, subnormal results included; exact at the ends."""
    x = torch.cat([torch.linspace(-105, 89, 200_001), torch.randn(100_000), -torch.logspace(-30, 2, 10_000)])
    found, exact = exponential(x), x.double().exp()
    ulp = torch.exp2(torch.floor(torch.log2(exact)).clamp_min(-126) - 23)
    inside = exact <= torch.finfo(torch.float32).max
    assert ((found.double() - exact).abs() / ulp)[inside].max() <= 2
    assert (found[~inside] == cases.INFINITY).all()
    ends = torch.tensor([0.0, -cases.INFINITY, cases.INFINITY, float("nan"), -1e30, 1e30, -0.0])
    expected = torch.tensor([1.0, 0.0, cases.INFINITY, float("nan"), 0.0, cases.INFINITY, 1.0])
    torch.testing.assert_close(exponential(ends), expected, rtol=0, atol=0, equal_nan=True)
    x = torch.cat([torch.linspace(-63, 63, 100_001), torch.randn(10_000)])
    error = exponential(x, bounded=True).double() / x.double().exp() - 1
    assert (error.abs() <= 1.2e-7 * (1 + x.abs())).all()  # that of rounding x / ln 2 to fp32
    assert exponential(torch.zeros(5), bounded=True).tolist() == [1.0] * 5


def test_exponential():
    check_exponential()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 15, 16, 17, 33, 4097])
def test_bounded_logits_of_every_length(M, dtype):
    """Lengths around vectors and blocks in both directions, with one slice out of bounds among the others."""
    for shape, dim in (((3, M), -1), ((2, 9, M), 1), ((5, 70, 3), 1)):
        student, teacher = cases.logits(shape, dtype)
        for spoilt in (False, True):
            if spoilt:
                student[(1,) * len(shape) if M > 1 else (1,) + (0,) * (len(shape) - 1)] = 300.0
            options = {"temperature": 1.3, "dim": dim, "target": "kl", "reduction": "none"}
            loss, gradient = cases.loss_and_gradient(student, teacher, backend="cpu", **options)
            exact = cases.loss_and_gradient(student.double(), teacher.double(), backend="reference", **options)
            cases.close(loss, exact[0], cases.tolerance(torch.float64 if dtype == torch.float64 else torch.float32))
            cases.close(gradient, exact[1], cases.tolerance(dtype))


def test_threads_do_not_change_a_bit():
    given = cases.features(200, 900, 20, K=2, weighted=True)
    student, teacher = cases.logits((70, 300))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = cases.feature_gradients(*given, "cpu") + cases.feature_gradients(*given, "cpu", fixed_anchors=True)
            for dim in (0, 1):
                found = (*found, *cases.loss_and_gradient(student, teacher, dim=dim, backend="cpu"))
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_subset_of_gradients():
    student, teacher, anchors, keywords = cases.features(12, 30, 7)
    every = cases.feature_gradients(student, teacher, anchors, keywords, "cpu")[1:]
    for mask in range(1, 8):
        leaves = [student.clone(), anchors.clone(), torch.tensor(20.0)]
        wanted = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if mask >> i & 1]
        loss = clk.feature_distill_kl(leaves[0], teacher, leaves[1], logit_scale=leaves[2], backend="cpu", **keywords)
        expected = [g for i, g in enumerate(every) if mask >> i & 1]
        for a, b in zip(torch.autograd.grad(loss * 1.7, wanted), expected, strict=True):
            cases.close(a, b, 1e-5)


def test_relation_reaches_both_factors():
    student, teacher, _, _ = cases.features(10, 10, 6)
    found = []
    for backend in ("cpu", "reference"):
        leaf = student.clone().requires_grad_()
        loss = clk.feature_distill_kl(
            leaf,
            teacher,
            leaf,
            teacher_anchors=teacher,
            logit_scale=30.0,
            columns=0.0,
            mask_diagonal=True,
            backend=backend,
        )
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    student, teacher = (t.double() for t in cases.logits((3, 4, 2)))
    for dim in (0, 1, 2):
        assert torch.autograd.gradcheck(
            lambda s, dim=dim: clk.distill_kl(s, teacher, dim=dim, backend="cpu"), student.requires_grad_()
        )
    student, teacher, anchors, keywords = cases.in_float64(*cases.features(4, 4, 3, K=2, own=1, weighted=True))
    keywords |= {"logit_scale": 4.0, "mask_diagonal": True, "backend": "cpu"}
    leaves = student.requires_grad_(), anchors.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, a: clk.feature_distill_kl(s, teacher, a, **keywords), leaves)
    fixed = anchors.detach()
    assert torch.autograd.gradcheck(lambda s: clk.feature_distill_kl(s, teacher, fixed, **keywords), leaves[:1])


@pytest.mark.parametrize(
    ("images", "captions", "threads"), [(512, 60000, 1), (512, 60000, 2), (256, 10000, 2), (64, 60000, 2)]
)
def test_peak_memory(images, captions, threads):
    """PyTorch takes up to 900 MB for these sizes. In a process of its own, whose peak shows nothing else."""
    sizes = [str(size) for size in (images, captions, 512, threads)]
    script = [str(Path(__file__).parent / "peak_memory.py"), *sizes]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, *script], env=environment, check=True, capture_output=True, text=True)
    assert 0 < int(run.stdout) < 24e6


def test_recomputed_gradients_equal_those_that_come_with_the_loss():
    """The operator's own backward pass, for those who call it with nothing but statistics saved."""
    student, teacher, anchors, keywords = cases.features(70, 300, 20, K=2, own=3, weighted=True)
    weight, own = keywords["sample_weight"], keywords["teacher_anchors"]
    for scale in (10.0, 1000.0):
        found = []
        for now in (False, True):
            leaves = [t.detach().clone().requires_grad_() for t in (student, anchors, torch.tensor(scale))]
            arguments = (leaves[0], teacher, leaves[1], own, weight, leaves[2], 1.0, 2.0, 0.7, 1.3, False, False)
            loss, *_ = torch.ops.cl_kernels.feature_distill_kl(*arguments, now, now)
            found.append((loss.detach(), *torch.autograd.grad(loss * 1.7, leaves)))
        for a, b in zip(*found, strict=True):
            cases.close(a, b, 1e-5 if scale < 100 else 2e-4)


def test_no_similarity_matrix():
    cases.check_memory("cpu", 60, 1000)


@pytest.mark.parametrize(
    "check",
    [
        cases.check_extremes,
        cases.check_views,
        cases.check_overwriting,
        cases.check_weights,
        cases.check_feature_views,
        cases.check_large_scale,
        cases.check_opcheck,
        cases.check_compile,
        cases.check_autocast,
        cases.check_operator_errors,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(check):
    check("cpu")


@pytest.mark.parametrize("M", [2048, 2049, 5000])
def test_long_rows(M):
    cases.check_long_rows("cpu", M)

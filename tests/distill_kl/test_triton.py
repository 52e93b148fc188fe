"""The Triton kernels of distillation in the interpreter."""

from __future__ import annotations

import distill_cases as cases
import pytest
import torch

import cl_kernels as clk

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # NumPy on masked lanes
]

LARGE = {"N": 100, "M": 100, "d": 16, "K": 2, "weighted": True, "target": "kl", "own": 8}
"""More blocks of rows and of columns than the two processors that the launcher counts in the interpreter get programs."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("target", ["cross_entropy", "kl"])
@pytest.mark.parametrize(("shape", "dim"), cases.LOGITS, ids=str)
def test_logits_equal_the_definition(shape, dim, target, dtype):
    cases.check_logits("triton", shape, dim, dtype, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.FEATURES, ids=str)
def test_features_equal_the_definition(case, dtype):
    cases.check_features("triton", case, dtype)


def test_long_rows():
    cases.check_long_rows("triton", 5000)


@pytest.fixture
def small_pieces(monkeypatch):
    """Scratch for one block of columns at a time, so that small matrices take several pieces."""
    from cl_kernels.distill_kl import triton_launch

    monkeypatch.setattr(triton_launch, "SCRATCH", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [cases.FEATURES[2], LARGE], ids=str)
def test_pieces_of_the_gradient(case, dtype, small_pieces):
    cases.check_features("triton", case, dtype)


def test_more_rows_than_slots():
    """Every program takes several blocks of rows; at scale 1e4 no tile can take its exponentials from one level."""
    from cl_kernels.distill_kl import triton_launch

    slots, group = triton_launch.forward_grid(4, 2, LARGE["N"], LARGE["M"], 2)
    assert slots < 4
    assert group < 2
    cases.check_features("triton", LARGE, torch.float32)
    cases.check_large_scale("triton", **LARGE)


def test_number_of_launches(monkeypatch):
    """Two launches forward; backward one, one per gradient of features, and one that finishes those of student and scale."""
    from triton.runtime.interpreter import GridExecutor

    launches, launch = [], GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    student, teacher, anchors, keywords = cases.features(6, 9, 4)
    scale = torch.tensor(5.0)
    for wanted, products in (([student], 1), ([student, scale], 1), ([anchors], 1), ([student, anchors, scale], 2)):
        for leaf in (student, anchors, scale):
            leaf.requires_grad_(any(leaf is other for other in wanted))
        launches.clear()
        loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=scale, backend="triton", **keywords)
        assert launches == ["forward_kernel", "merge_kernel"]
        launches.clear()
        torch.autograd.grad(loss, wanted)
        finish = [] if wanted[0] is anchors else ["finish_kernel"]
        assert launches == ["gradient_kernel", *["product_kernel"] * products, *finish]


def test_no_similarity_matrix(small_pieces):
    cases.check_memory("triton", 96, 768)


@pytest.mark.parametrize(
    ("N", "M"), [(64, 1_000), (64, 60_000), (256, 10_000), (4096, 100_000), (100_000, 1_000), (1, 1)]
)
@pytest.mark.parametrize("processors", [2, 132])
def test_forward_scratch_is_bounded(N, M, processors):
    """The statistics left behind grow with N and with M, never with their product, and every entry belongs to one program."""
    from cl_kernels.distill_kl import triton_launch

    row_blocks, column_blocks, programs = -(-N // 64), -(-M // 128), 2 * processors
    slots, group = triton_launch.forward_grid(row_blocks, column_blocks, N, M, programs)
    groups = -(-column_blocks // group)
    assert 1 <= slots <= row_blocks
    assert groups * group >= column_blocks
    assert slots * M + groups * N <= 4 * (programs * N * M) ** 0.5 + programs * (64 + 128) + 2 * (N + M)
    assert slots * groups >= min(row_blocks * column_blocks, programs) / 3


def test_float64_features_are_refused():
    student = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        clk.feature_distill_kl(student, student, student, logit_scale=1.0, backend="triton")


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
    check("triton")

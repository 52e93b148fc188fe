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


def test_no_similarity_matrix():
    cases.check_memory("triton", 60, 400)


def test_float64_features_are_refused():
    student = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        clk.feature_distill_kl(student, student, student, logit_scale=1.0, backend="triton")


@pytest.mark.parametrize(
    "check",
    [
        cases.check_extremes,
        cases.check_views,
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

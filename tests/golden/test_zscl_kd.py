"""The distillation losses of ZSCL and their gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from golden_cases import load, max_error

import cl_kernels as clk

VALUES, METADATA = load("zscl_kd")
CASES = {case["case"]: case for case in METADATA["cases"]}
LOSSES = {
    "image_loss": {"rows": 1.0, "columns": 0.0},
    "text_loss": {"rows": 0.0, "columns": 1.0},
    "both": {"rows": 1.0, "columns": 1.0},
    "relation_loss": {"rows": 1.0, "columns": 0.0, "mask_diagonal": True},
}


def check(case: int, name: str, backend: str) -> None:
    values = {key.split(".", 1)[1]: value for key, value in VALUES.items() if key.startswith(f"{case}.")}
    raw = values["student_raw"].clone().requires_grad_()
    student, teacher = raw / raw.norm(dim=-1, keepdim=True), values["teacher"]
    options = dict(logit_scale=CASES[case]["s"], temperature=CASES[case]["T"], backend=backend, **LOSSES[name])
    if name == "relation_loss":
        loss = clk.feature_distill_kl(student, teacher, student, teacher_anchors=teacher, **options)
    else:
        loss = clk.feature_distill_kl(student, teacher, values["teacher_text"], **options)
    gradient, raw_gradient = torch.autograd.grad(loss, (student, raw))
    assert max_error(loss, values[name]) <= 1e-5
    assert max_error(gradient, values[f"{name}.grad_student"]) <= 2e-5
    assert max_error(raw_gradient, values[f"{name}.grad_student_raw"]) <= 2e-5


def check_logits(case: int, backend: str) -> None:
    """The same losses through :func:`cl_kernels.distill_kl`."""
    s, T = CASES[case]["s"], CASES[case]["T"]
    student, teacher, text = (VALUES[f"{case}.{name}"] for name in ("student", "teacher", "teacher_text"))
    student = student.clone().requires_grad_()
    for name, dim in (("image_loss", -1), ("text_loss", -2)):
        loss = clk.distill_kl(s * student @ text.T, s * teacher @ text.T, temperature=T, dim=dim, backend=backend)
        assert max_error(loss, VALUES[f"{case}.{name}"]) <= 1e-5
        gradient = torch.autograd.grad(loss, student)[0]
        assert max_error(gradient, VALUES[f"{case}.{name}.grad_student"]) <= 2e-5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_reference(case, name):
    check(case, name, "reference")
    check_logits(case, "reference")


@pytest.mark.native
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_compiled(case, name):
    check(case, name, "cpu")
    check_logits(case, "cpu")


@pytest.mark.interpreter
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_triton(case, name):
    check(case, name, "triton")
    check_logits(case, "triton")

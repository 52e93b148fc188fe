"""The Triton kernel of top-k gating in the interpreter."""

from __future__ import annotations

import gating_cases as cases
import pytest
import torch

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_equals_the_definition(shape, noisy, dtype):
    cases.check_against_float64("triton", shape, noisy, dtype)


def test_ties_and_extremes():
    cases.check_ties_and_extremes("triton")


def test_views():
    cases.check_views("triton")


@pytest.mark.parametrize("noisy", [False, True])
def test_gradients(noisy):
    cases.check_gradients("triton", noisy)


def test_gradients_equal_autograd():
    cases.check_gradients_equal_autograd("triton", torch.float32)


def test_opcheck():
    cases.check_opcheck("triton")


def test_compiles_without_a_break():
    cases.check_compile("triton")


def test_autocast():
    cases.check_autocast("triton")


def test_operator_refuses_what_does_not_fit():
    cases.check_errors("triton")

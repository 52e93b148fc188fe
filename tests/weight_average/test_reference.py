"""The definition of weight averaging, its arguments and its warning."""

from __future__ import annotations

import warnings

import average_cases as cases
import pytest
import torch

import cl_kernels as clk
from cl_kernels import weight_average


@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS)
def test_is_the_formula(average_dtype, value_dtype):
    cases.check_against_float64("reference", average_dtype, value_dtype, 1 / 3)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, 2.0])
def test_any_weight(weight):
    cases.check_against_float64("reference", torch.float32, torch.float32, weight)


def test_layouts():
    cases.check_layouts("reference")


def test_running_mean():
    cases.check_running_mean("reference")


def test_autograd_sees_the_change():
    cases.check_autograd_sees_the_change("reference")


def test_nothing_to_average():
    assert clk.average_([], [], 0.5) is None
    assert clk.average_(iter([]), (t for t in ()), 0.5) is None


def same_tensor_twice():
    a = torch.zeros(3)
    return [a, a], [torch.zeros(3)] * 2


def value_is_another_average():
    a, b = torch.zeros(3), torch.zeros(3)
    return [a, b], [b, torch.ones(3)]


@pytest.mark.parametrize(
    ("averages", "values", "error", "message"),
    [
        ([torch.zeros(3)], [], ValueError, "1 tensors against 0"),
        ([torch.zeros(3)], [torch.zeros(4)], ValueError, r"averages\[0\] is \(3,\), values\[0\] is \(4,\)"),
        ([torch.zeros(3, dtype=torch.int64)], [torch.zeros(3)], TypeError, r"averages\[0\]: got torch.int64"),
        ([torch.zeros(3)], [3.0], TypeError, r"values\[0\]: got float"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], ValueError, "averages.0. is on cpu, values.0. on meta"),
        (*same_tensor_twice(), ValueError, r"averages\[1\] is the same memory as averages\[0\]"),
        (*value_is_another_average(), ValueError, r"values\[0\] is the same memory as averages\[1\]"),
        ([torch.zeros(1).expand(3)], [torch.zeros(3)], ValueError, r"averages\[0\]: got an expanded tensor"),
    ],
)
def test_errors_name_the_argument(averages, values, error, message):
    with pytest.raises(error, match=message):
        clk.average_(averages, values, 0.5)


def test_weight_must_be_a_number():
    with pytest.raises(TypeError, match="weight: got str, expected a number"):
        clk.average_([torch.zeros(1)], [torch.zeros(1)], "0.5")


def test_an_average_with_itself_stays():
    a = torch.randn(5)
    before = a.clone()
    clk.average_([a], [a], 0.7)
    assert torch.equal(a, before)


@pytest.mark.parametrize(("dtype", "weight"), [(torch.bfloat16, 0.001), (torch.float16, 0.0004)])
def test_warns_once_where_a_half_average_would_stall(dtype, weight, monkeypatch):
    monkeypatch.setattr(weight_average, "_warned", set())
    average, value = torch.ones(4, dtype=dtype), torch.full((4,), 1.0 + 0.5 * (dtype == torch.bfloat16))
    with pytest.warns(RuntimeWarning, match="can stand still.*float32"):
        clk.average_([average], [value], weight)
    assert torch.equal(average, torch.ones(4, dtype=dtype))  # it does stand still
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clk.average_([average], [value], weight)
        clk.average_([torch.ones(4)], [value], weight)

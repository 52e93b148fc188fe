"""The Triton kernel of weight averaging in the interpreter."""

from __future__ import annotations

import average_cases as cases
import pytest
import torch

import cl_kernels as clk

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]
ULPS = {torch.bfloat16: 2.0}
"""The interpreter truncates fp32 to bf16 where hardware rounds."""


@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS)
def test_equals_the_formula(average_dtype, value_dtype):
    cases.check_against_float64("triton", average_dtype, value_dtype, 1 / 3, ULPS.get(average_dtype, 1.0))


def test_more_than_one_program_for_a_tensor():
    from cl_kernels.weight_average import triton_kernels

    averages, values = cases.lists(torch.float32, torch.float16, shapes=[(2 * triton_kernels.CHUNK + 4097,), (9,)])
    expected = cases.exact(averages, values, 0.3)
    clk.average_(averages, values, 0.3, backend="triton")
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e.float())


def test_one_launch_for_a_whole_list(monkeypatch):
    from cl_kernels.weight_average import triton_launch

    kernel, grids = triton_launch.average_kernel, []

    class Counting:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_launch, "average_kernel", Counting())
    averages, values = cases.lists(torch.float32, torch.float32, shapes=[(64,)] * 30)
    expected = cases.exact(averages, values, 0.5)
    clk.average_(averages, values, 0.5, backend="triton")
    assert grids == [(30,)]
    torch.testing.assert_close(averages, [e.float() for e in expected])


def test_table_is_reused_and_follows_new_memory(monkeypatch):
    from cl_kernels.weight_average import triton_launch

    built, build = [], triton_launch._tables
    monkeypatch.setattr(triton_launch, "_tables", lambda lists: (built.append(1), build(lists))[1])
    averages, values = cases.lists(torch.float32, torch.float32, shapes=[(8,), (9,)])
    for _ in range(3):
        clk.average_(averages, values, 0.5, backend="triton")
    assert len(built) == 1
    moved = [a.clone() for a in averages]
    expected = cases.exact(moved, values, 0.5)
    clk.average_(moved, values, 0.5, backend="triton")
    torch.testing.assert_close(moved, [e.float() for e in expected])
    assert len(built) == 2


def test_three_way():
    cases.check_three_way("triton", ulps=2.0)


def test_stochastic_rounding_draws_the_bits_of_the_reference():
    cases.check_stochastic_bits("triton")
    cases.check_stochastic_three_way("triton")


def test_stochastic_rounding_of_more_than_one_program():
    from cl_kernels.weight_average import triton_kernels

    value, results = torch.randn(triton_kernels.CHUNK + 5000), []
    for backend in ("triton", "reference"):
        averages = [torch.zeros(11, dtype=torch.bfloat16), torch.zeros_like(value, dtype=torch.bfloat16)]
        clk.average_(averages, [torch.ones(11), value], 1.0, rounding="stochastic", seed=3, backend=backend)
        results.append(averages[1])
    assert torch.equal(*results)


def test_layouts():
    cases.check_layouts("triton")


def test_running_mean():
    cases.check_running_mean("triton")


def test_autograd_sees_the_change():
    cases.check_autograd_sees_the_change("triton")


def test_opcheck():
    cases.check_opcheck("triton")


def test_compiles_without_a_break():
    cases.check_compile("triton")


def test_operator_refuses_what_does_not_fit():
    cases.check_operator_refuses("triton")

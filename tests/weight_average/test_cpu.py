"""The compiled weight averaging."""

from __future__ import annotations

import os
import sys

import average_cases as cases
import pytest
import torch

import cl_kernels as clk


@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS)
def test_equals_the_formula(average_dtype, value_dtype):
    cases.check_against_float64("cpu", average_dtype, value_dtype, 1 / 3)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, forked_torch, tmp_path):
    """Each in its own process, because the choice is made once. Where the machine lacks one, the best that it has runs."""
    code = (
        "import average_cases as c\nfor pair in c.PAIRS: c.check_against_float64('cpu', *pair, 0.3)\nc.check_layouts('cpu')\n"
        "c.check_three_way('cpu'); c.check_stochastic_bits('cpu')"
    )
    (tmp_path / "program.py").write_text(code)
    done = forked_torch.run(
        tmp_path / "program.py", environment={"CL_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr


def test_extreme_halves():
    """Subnormals, the largest numbers, infinities and NaN survive storage in 16 bits as PyTorch stores them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        stored = torch.zeros_like(every)
        clk.average_([stored], [every], 1.0, backend="cpu")
        expected = torch.zeros_like(every)
        clk.average_([expected], [every], 1.0, backend="reference")
        assert torch.equal(stored.isnan(), expected.isnan())
        assert torch.equal(stored[~stored.isnan()], expected[~expected.isnan()])


def test_rounds_to_nearest_even():
    wide = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * torch.logspace(-8, 5, 4096)
    for dtype in (torch.float16, torch.bfloat16):
        stored = torch.zeros(4096, dtype=dtype)
        clk.average_([stored], [wide], 1.0, backend="cpu")
        assert torch.equal(stored, wide.to(dtype))


def test_threads_do_not_change_a_bit():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            averages, values = cases.lists(torch.bfloat16, torch.float32, shapes=[(70_001,), (300_000,), (5,)])
            clk.average_(averages, values, 0.3, backend="cpu")
            results.append(averages)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_three_way():
    cases.check_three_way("cpu")


def test_stochastic_rounding_draws_the_bits_of_the_reference():
    cases.check_stochastic_bits("cpu")
    cases.check_stochastic_three_way("cpu")


def test_stochastic_rounding_does_not_stall():
    cases.check_stochastic_does_not_stall("cpu")


def test_threads_do_not_change_stochastic_rounding():
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            averages, values = cases.lists(torch.bfloat16, torch.float32, shapes=[(70_001,), (300_000,), (5,)])
            clk.average_(averages, values, 0.3, rounding="stochastic", seed=11, backend="cpu")
            results.append(averages)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layouts():
    cases.check_layouts("cpu")


def test_allocates_nothing_tensor_sized():
    averages, values = cases.lists(torch.float32, torch.bfloat16, shapes=[(1000,), (10, 10)])
    others, _ = cases.lists(torch.float32, torch.float32, shapes=[(1000,), (10, 10)], seed=1)
    halves = [average.half() for average in averages]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        clk.average_(averages, values, 0.5, backend="cpu")
        clk.blend_(averages, values, others, 0.5, 0.25, backend="cpu")
        clk.average_(halves, values, 0.5, rounding="stochastic", seed=1, backend="cpu")
    assert sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0) == 0


def test_running_mean():
    cases.check_running_mean("cpu")


def test_autograd_sees_the_change():
    cases.check_autograd_sees_the_change("cpu")


def test_no_gradient_flows_while_gradients_are_recorded():
    """Leaves that require gradients are averaged in place, and a graph that led to an average stays as it was."""
    leaf, value = torch.ones(3, requires_grad=True), torch.full((3,), 3.0, requires_grad=True)
    average = leaf * 2
    recorded = average.grad_fn
    clk.average_([leaf, average], [value, value], 0.5)
    assert torch.is_grad_enabled()
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.tolist() == [2.0] * 3
    assert average.tolist() == [2.5] * 3
    assert average.grad_fn is recorded
    average.sum().backward()
    assert leaf.grad.tolist() == [2.0] * 3
    assert value.grad is None


def test_opcheck():
    cases.check_opcheck("cpu")


@pytest.mark.parametrize("backend", ["cpu", None])
def test_compiles_without_a_break(backend):
    cases.check_compile(backend)


def test_operator_refuses_what_does_not_fit():
    cases.check_operator_refuses("cpu")


def test_the_operator_takes_plain_lists_without_a_plan(monkeypatch):
    """Its own checks are what a call with many small tensors can afford; the plan is for what it refuses."""
    monkeypatch.setattr("cl_kernels.weight_average.plan.find", lambda lists: pytest.fail("looked for a plan"))
    averages, values = (
        [torch.zeros(3), torch.zeros(0), torch.zeros(2, 2)],
        [torch.ones(3), torch.ones(0), torch.ones(2, 2)],
    )
    clk.average_(averages, values, 0.5)
    clk.blend_(averages, values, values, 0.25, 0.25)
    assert averages[2].tolist() == [[0.75, 0.75], [0.75, 0.75]]
    assert averages[0]._version == 2


def test_what_the_operator_refuses_is_named_and_untouched():
    averages, values = [torch.zeros(2, 3), torch.zeros(4)], [torch.ones(2, 3), torch.ones(4)]
    with pytest.raises(ValueError, match=r"averages\[0\] is \(2, 3\), values\[0\] is \(3, 2\)"):
        clk.average_(averages, [values[0].view(3, 2), values[1]], 0.5)
    with pytest.raises(ValueError, match=r"averages\[1\] is the same memory as averages\[0\]"):
        clk.average_([averages[1], averages[1]], [values[1], values[1]], 0.5)
    with pytest.raises(ValueError, match=r"values\[0\] is the same memory as averages\[1\]"):
        clk.average_([torch.zeros(4), averages[1]], [averages[1], values[1]], 0.5)
    with pytest.raises(TypeError, match=r"values\[1\]: got torch\.int32"):
        clk.average_(averages, [values[0], values[1].int()], 0.5)
    assert all((a == 0).all() for a in averages)
    for _ in range(2):  # refused once, then not tried again
        transposed = torch.zeros(3, 2).T
        clk.average_([transposed], [values[0]], 0.5)
        assert (transposed == 0.5).all()


def test_many_rows_share_the_table_of_owners():
    averages = list(torch.zeros(3000, 16).unbind())
    values = [torch.full((16,), float(i)) for i in range(3000)]
    clk.average_(averages, values, 0.5)
    assert [float(a[0]) for a in averages] == [i / 2 for i in range(3000)]
    with pytest.raises(ValueError, match=r"averages\[2999\] is the same memory as averages\[7\]"):
        clk.average_([*averages[:-1], averages[7]], values, 0.5)

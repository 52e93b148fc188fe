"""Inputs and checks that every implementation of weight averaging is held to."""

from __future__ import annotations

import itertools

import pytest
import torch

import cl_kernels as clk
from cl_kernels import library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
SHAPES = [(), (1,), (0,), (3, 0), (7,), (33, 5), (4096,), (5000,)]
EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def lists(average_dtype, value_dtype, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    averages = [torch.randn(shape, generator=generator, dtype=torch.float64).to(average_dtype) for shape in shapes]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(value_dtype) for shape in shapes]
    return averages, values


def exact(averages, values, weight):
    return [a.double() + weight * (v.double() - a.double()) for a, v in zip(averages, values, strict=True)]


def check_against_float64(backend, average_dtype, value_dtype, weight, ulps=1.0):
    """One rounding to the stored dtype, and one or two of the fp32 arithmetic."""
    averages, values = lists(average_dtype, value_dtype)
    kept = [v.clone() for v in values]
    expected = exact(averages, values, weight)
    clk.average_(averages, values, weight, backend=backend)
    for a, e in zip(averages, expected, strict=True):
        tolerance = (
            ulps * EPSILON[average_dtype] + 4 * EPSILON[torch.float32 if average_dtype != torch.float64 else a.dtype]
        )
        assert a.dtype == average_dtype
        assert torch.all((a.double() - e).abs() <= tolerance * e.abs().clamp(min=1.0))
    assert all(torch.equal(v, k) for v, k in zip(values, kept, strict=True))


def check_layouts(backend):
    """Channels-last weights, transposes, slices, views off the 16-byte grid and pairs in different order; neighbours stay."""
    for dtype in (torch.float32, torch.bfloat16):
        frame = torch.full((12, 12), 42.0, dtype=dtype)
        slab = torch.full((4099,), 42.0, dtype=dtype)
        averages = [
            torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
            torch.randn(6, 7).to(dtype).T,
            frame[2:7, 3:9],
            slab[1:4098],
            torch.randn(5, 1, 4).to(dtype).transpose(0, 2),
        ]
        values = [
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(7, 6),
            torch.randn(5, 6),
            torch.randn(4097),
            torch.randn(1, 1, 5).expand(4, 1, 5),
        ]
        for a in averages:
            a.copy_(torch.randn(a.shape))
        expected = exact(averages, values, 0.25)
        clk.average_(averages, values, 0.25, backend=backend)
        for a, e in zip(averages, expected, strict=True):
            assert torch.all((a.double() - e).abs() <= 4 * EPSILON[dtype] * e.abs().clamp(min=1.0))
        outside = torch.ones_like(frame, dtype=torch.bool)
        outside[2:7, 3:9] = False
        assert torch.all(frame[outside] == 42)
        assert slab[0] == slab[-1] == 42


def check_autograd_sees_the_change(backend):
    """Parameters that a graph has saved may not change unnoticed, and no graph is recorded."""
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight.detach().clone().requires_grad_()).sum()
    clk.average_([weight], [torch.zeros(3)], 0.5, backend=backend)
    assert weight.is_leaf
    assert weight.requires_grad
    assert torch.equal(weight, torch.full((3,), 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_running_mean(backend):
    snapshots = [torch.full((3,), float(value)) for value in (1, 2, 6, 11)]
    average = snapshots[0].clone()
    for n, value in enumerate(snapshots[1:], start=1):
        clk.average_([average], [value], 1 / (n + 1), backend=backend)
    torch.testing.assert_close(average, torch.full((3,), 5.0))


def check_opcheck(backend):
    averages, values = lists(torch.float32, torch.bfloat16, shapes=[(), (5,), (33, 5)])
    others, _ = lists(torch.float16, torch.float32, shapes=[(), (5,), (33, 5)], seed=1)
    op = library.operator("average_", backend)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (averages, values, 0.3, [], 0.0, None), test_utils=utilities)
    torch.library.opcheck(op, (averages, values, 0.3, others, 0.2, 5), test_utils=utilities)


def check_compile(backend):
    def run(averages, values, weight):
        clk.average_(averages, values, weight, backend=backend)
        return averages[1] * 2

    averages, values = lists(torch.float32, torch.float32, shapes=[(4,), (2, 3)])
    plain = [a.clone() for a in averages]
    expected = run(plain, values, 0.3)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(averages, values, 0.3)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(averages, plain, strict=True))


def check_operator_refuses(backend):
    op = library.operator("average_", backend)
    for averages, values, others in (
        ([torch.zeros(4)], [], []),
        ([torch.zeros(4)], [torch.zeros(3)], []),
        ([torch.zeros(4, 4).T], [torch.zeros(4, 4)], []),
        ([torch.zeros(4)], [torch.zeros(4)], [torch.zeros(3)]),
        ([torch.zeros(4)] * 2, [torch.zeros(4)] * 2, [torch.zeros(4)]),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            op(averages, values, 0.5, others, 0.0, None)


def check_three_way(backend, ulps=1.0):
    """Every dtype in every place."""
    combinations = [*zip(*[DTYPES] * 3, strict=True), *itertools.permutations(DTYPES, 3)]
    for average_dtype, value_dtype, other_dtype in combinations:
        averages, values = lists(average_dtype, value_dtype)
        others, _ = lists(other_dtype, value_dtype, seed=1)
        expected = [
            a.double() + 0.3 * (v.double() - a.double()) + 0.45 * (o.double() - a.double())
            for a, v, o in zip(averages, values, others, strict=True)
        ]
        clk.blend_(averages, values, others, 0.3, 0.45, backend=backend)
        compute = average_dtype if average_dtype == torch.float64 else torch.float32
        for a, e in zip(averages, expected, strict=True):
            tolerance = ulps * EPSILON[average_dtype] + 8 * EPSILON[compute]
            assert torch.all((a.double() - e).abs() <= tolerance * e.abs().clamp(min=1.0))


def between(dtype, count=3000):
    """fp32 numbers (count,) of all magnitudes, few of which ``dtype`` can hold, and 7 special ones behind them."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-30, 15, (count,), generator=generator)
    numbers = torch.ldexp(1 + torch.rand(count, generator=generator), exponents)
    numbers *= torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    limit = torch.finfo(dtype).max
    return torch.cat([numbers, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, limit, 2.0**-24])])


def check_stochastic_bits(backend):
    """The reference's results to the bit where fp32 arithmetic is exact: from 0 with weight 1, for several lengths."""
    for dtype in (torch.bfloat16, torch.float16):
        values = [between(dtype)[:n] for n in (3007, 1, 0, 9, 129, 2000)]
        values.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        results = []
        for chosen in (backend, "reference"):
            averages = [torch.zeros_like(v, dtype=dtype) for v in values]
            clk.average_(averages, values, 1.0, rounding="stochastic", seed=2**40 + 7, backend=chosen)
            results.append(averages)
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def check_stochastic_three_way(backend):
    """Rounded once, after both terms: sums that fp32 holds exactly."""
    generator = torch.Generator().manual_seed(4)
    start, value, other = (torch.randint(-64, 64, (700,), generator=generator) / 64 for _ in range(3))
    results = []
    for chosen in (backend, "reference"):
        average = start.bfloat16()
        clk.blend_([average], [value], [other], 0.25, 2.0**-6, rounding="stochastic", seed=1, backend=chosen)
        results.append(average)
    assert torch.equal(*results)


def check_stochastic_does_not_stall(backend):
    """A thousand steps of decay 0.999 from 1 towards 1.5, which nearest rounding leaves at 1 for ever."""
    average, value = torch.ones(512, dtype=torch.bfloat16), torch.full((512,), 1.5)
    for step in range(1000):
        clk.average_([average], [value], 1e-3, rounding="stochastic", seed=step, backend=backend)
    expected = 1.5 - 0.5 * 0.999**1000
    assert abs(average.double().mean() - expected) < 0.01
    assert average.double().std() < 0.1

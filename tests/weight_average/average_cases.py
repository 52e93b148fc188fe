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
    op = library.operator("average_", backend)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (averages, values, 0.3), test_utils=utilities)


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
    with pytest.raises((RuntimeError, ValueError)):
        op([torch.zeros(4)], [], 0.5)
    with pytest.raises((RuntimeError, ValueError)):
        op([torch.zeros(4)], [torch.zeros(3)], 0.5)
    with pytest.raises((RuntimeError, ValueError)):
        op([torch.zeros(4, 4).T], [torch.zeros(4, 4)], 0.5)

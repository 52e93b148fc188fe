"""Inputs and checks that every implementation of top-k gating is held to."""

from __future__ import annotations

import pytest
import torch

import cl_kernels as clk
from cl_kernels import library

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 2), (16, 64, 22, 2), (19, 130, 17, 5), (33, 9, 40, 40), (0, 4, 3, 2), (6, 0, 3, 2)]
"""(rows, width, experts, k): ragged, more experts than a panel, all of them, no rows, no width."""


def fused(shapes, dtypes):
    """Of the shapes and dtypes those that the Triton kernels hold in their tiles."""
    return [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}")
        for shape in shapes
        for dtype in dtypes
        if shape[2] <= (32 if dtype == torch.float64 else 128)
    ]


def inputs(rows, width, experts, noisy=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    w_gate = torch.randn(width, experts, generator=generator).to(dtype)
    w_noise = torch.randn(width, experts, generator=generator).to(dtype) if noisy else None
    noise = torch.randn(rows, experts, generator=generator).to(dtype) if noisy else None
    return x, w_gate, w_noise, noise


def check_against_float64(backend, shape, noisy, dtype):
    rows, width, experts, k = shape
    given = inputs(rows, width, experts, noisy, dtype)
    gates, ids, usage = clk.top_k_gating(*given[:3], k=k, noise=given[3], backend=backend)
    exact = [None if t is None else t.double() for t in given]
    expected = clk.top_k_gating(*exact[:3], k=k, noise=exact[3], backend="reference")
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gates.shape == ids.shape == (rows, k)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(gates.double(), expected[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(usage, expected[2])
    assert usage.sum() == rows * k


def check_ties_and_extremes(backend):
    """Equal logits, infinities and NaN: the same experts as the stable sort of the definition, and never an id out of range."""
    experts = 18
    x = torch.eye(6)
    w_gate = torch.zeros(6, experts)
    w_gate[1, [3, 17]] = 1e4
    w_gate[2] = -1e4
    w_gate[3, 5], w_gate[3, 2] = float("inf"), 7.0
    w_gate[4, 16] = float("nan")
    w_gate[5] = float("-inf")
    for row in range(6):  # one row at a time: 0 · inf in a product would spread to the other rows
        one = x[row : row + 1, row : row + 1].contiguous(), w_gate[row : row + 1].contiguous()
        gates, ids, usage = clk.top_k_gating(*one, k=3, backend=backend)
        expected = clk.top_k_gating(*one, k=3, backend="reference")
        assert torch.equal(ids, expected[1]), row
        torch.testing.assert_close(gates, expected[0], equal_nan=True)
        assert torch.equal(usage, expected[2])


def check_views(backend):
    """Router input as token 0 of (B, L, D), transposed weights, broadcast noise."""
    tokens = torch.randn(6, 4, 10)
    w_gate, w_noise, noise = torch.randn(5, 10).T, torch.randn(5, 10).T, torch.randn(5).expand(6, 5)
    for x in (tokens[:, 0], torch.randn(10, 6).T):
        given = clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend=backend)
        dense = clk.top_k_gating(
            x.contiguous(),
            w_gate.contiguous(),
            w_noise.contiguous(),
            k=2,
            noise=noise.contiguous(),
            backend=backend,
        )
        for a, b in zip(given, dense, strict=True):
            assert torch.equal(a, b)


def check_gradients(backend, noisy):
    x, w_gate, w_noise, noise = inputs(4, 6, 5, noisy, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w_gate, w_noise) if t is not None]

    def gates(*given):
        return clk.top_k_gating(given[0], given[1], given[2] if noisy else None, k=3, noise=noise, backend=backend)[0]

    assert torch.autograd.gradcheck(gates, leaves)
    assert torch.autograd.gradgradcheck(gates, leaves)


def check_gradients_equal_autograd(backend, dtype):
    """Against the reference differentiated by autograd, every subset of inputs that need gradients."""
    for mask in range(1, 8):
        found = []
        for chosen in (backend, "reference"):
            x, w_gate, w_noise, noise = inputs(7, 33, 9, True, dtype)
            leaves = [t.requires_grad_() for i, t in enumerate((x, w_gate, w_noise)) if mask >> i & 1]
            gates, _, _ = clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend=chosen)
            upstream = torch.arange(gates.numel(), dtype=gates.dtype).reshape(gates.shape).cos()
            found.append(torch.autograd.grad((gates * upstream).sum(), leaves))
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b, **({"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {}))


def check_opcheck(backend):
    op = library.operator("top_k_gating", backend)
    for noisy in (True, False):
        x, w_gate, w_noise, noise = inputs(5, 8, 6, noisy)
        leaves = [None if t is None else t.requires_grad_() for t in (x, w_gate, w_noise)]
        torch.library.opcheck(op, (*leaves, noise, 2))


def check_compile(backend):
    x, w_gate, w_noise, noise = inputs(5, 8, 6)

    def run(x, w_gate, w_noise, noise):
        return clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, compiled):
        leaves = [t.detach().clone().requires_grad_() for t in (x, w_gate, w_noise)]
        gates, ids, usage = function(*leaves, noise)
        gates.square().sum().backward()
        results.append((gates, ids, usage, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def check_autocast(backend):
    x, w_gate, w_noise, noise = inputs(5, 8, 6)
    plain = clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend=backend)
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    leaves = [t.requires_grad_() for t in (x, w_gate, w_noise)]
    gates, _, _ = clk.top_k_gating(*leaves, k=2, noise=noise, backend=backend)
    upstream = torch.arange(10.0).view(5, 2).cos()
    expected = torch.autograd.grad(gates, leaves, upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):  # where backward() is often called by mistake
        found = torch.autograd.grad(gates, leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def check_errors(backend):
    """The operator itself refuses what would read out of bounds, for those who call it without the public function."""
    op = library.operator("top_k_gating", backend)
    with pytest.raises((RuntimeError, ValueError)):
        op(torch.zeros(2, 3), torch.zeros(4, 5), None, None, 2)
    with pytest.raises((RuntimeError, ValueError)):
        op(torch.zeros(2, 3), torch.zeros(3, 5), None, None, 6)
    with pytest.raises((RuntimeError, ValueError)):
        op(torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(1, 5), 2)

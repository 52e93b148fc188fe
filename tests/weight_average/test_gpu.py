"""Weight averaging on a GPU: values with both backends, no waiting for the device, CUDA graphs, the reference's random bits."""

from __future__ import annotations

import average_cases as cases
import pytest
import torch
from gpu_steps import capture, waiting_is_an_error

import cl_kernels as clk

pytestmark = pytest.mark.gpu

BACKENDS = [name for name in ("triton", "cuda") if clk.backends()["average_"][name] == "available"]
LARGE = [*cases.SHAPES, (300_001,)]  # several programs for one tensor


def on_gpu(tensors):
    return [tensor.cuda() for tensor in tensors]


def test_a_kernel_is_available():
    assert "triton" in BACKENDS, clk.backends()["average_"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS, ids=str)
def test_equals_the_formula(average_dtype, value_dtype, backend):
    averages, values = map(on_gpu, cases.lists(average_dtype, value_dtype, shapes=LARGE))
    expected = cases.exact(averages, values, 1 / 3)
    clk.average_(averages, values, 1 / 3, backend=backend)
    compute = average_dtype if average_dtype == torch.float64 else torch.float32
    tolerance = cases.EPSILON[average_dtype] + 4 * cases.EPSILON[compute]
    for a, e in zip(averages, expected, strict=True):
        assert a.dtype == average_dtype
        assert torch.all((a.double() - e).abs() <= tolerance * e.abs().clamp(min=1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula_of_views_leaves_their_neighbours(dtype, backend):
    """Off the 16-byte grid, strided and transposed."""
    slab, frame = (torch.full(shape, 42.0, dtype=dtype, device="cuda") for shape in ((70_001,), (12, 12)))
    averages = [slab[1:70_000], frame[2:7, 3:9], torch.empty(6, 7, dtype=dtype, device="cuda").T]
    for a in averages:
        a.copy_(torch.randn(a.shape))
    values = [torch.randn(a.shape, device="cuda") for a in averages]
    expected = cases.exact(averages, values, 0.25)
    clk.average_(averages, values, 0.25, backend=backend)
    for a, e in zip(averages, expected, strict=True):
        assert torch.all((a.double() - e).abs() <= 4 * cases.EPSILON[dtype] * e.abs().clamp(min=1.0))
    assert slab[0] == slab[-1] == 42
    frame[2:7, 3:9] = 42
    assert torch.all(frame == 42)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_draws_the_bits_of_the_cpu(dtype, backend):
    values = [cases.between(dtype)[:n] for n in (3007, 1, 0, 9, 2000)]
    expected = [torch.zeros_like(value, dtype=dtype) for value in values]
    found = on_gpu(expected)
    clk.average_(expected, values, 1.0, rounding="stochastic", seed=2**40 + 7, backend="reference")
    clk.average_(found, on_gpu(values), 1.0, rounding="stochastic", seed=2**40 + 7, backend=backend)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_and_a_graph_averages_again(backend):
    averages, values = map(on_gpu, cases.lists(torch.float32, torch.bfloat16, shapes=LARGE))

    def step():
        clk.average_(averages, values, 0.25, backend=backend)

    step()  # compiles, and writes its table of addresses
    with waiting_is_an_error():
        step()
    graph, _ = capture(step)
    before = cases.exact(averages, values, 0.25)
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(averages, before, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-6, rtol=1e-6)

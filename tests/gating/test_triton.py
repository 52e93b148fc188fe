"""The Triton kernel of top-k gating in the interpreter."""

from __future__ import annotations

import gating_cases as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cl_kernels as clk
from cl_kernels import dispatch, library

if dispatch.INTERPRETING:
    from cl_kernels.gating import triton_backward, triton_kernels

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

PUBLISHED = (64, 768, 22, 2)
"""Rows, width, experts and k of a training step on ViT-B/16."""


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), cases.fused(cases.SHAPES, (torch.float32, torch.float16, torch.float64)))
def test_equals_the_definition(shape, dtype, noisy):
    cases.check_against_float64("triton", shape, noisy, dtype)


def test_ties_and_extremes():
    cases.check_ties_and_extremes("triton")


def test_views():
    cases.check_views("triton")


class Dispatched(TorchDispatchMode):
    """Writes down the dispatched operations that write: all but allocations, and what the fixture fills these with."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names += [name] if name not in ("empty", "fill_") else []
        return function(*args, **kwargs or {})


def launches_of(monkeypatch, shape, dtype=torch.float32):
    """Grids of the launched kernels, and the operations dispatched before them; the results are those of the definition."""
    from triton.runtime.interpreter import GridExecutor

    rows, width, experts, k = shape
    given = cases.inputs(rows, width, experts, True, dtype)
    grids, before, call, dispatched = [], [], GridExecutor.__call__, Dispatched()

    def counted(self, *args, **kwargs):
        grids.append(self.grid)
        before.extend(dispatched.names)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    with dispatched:
        found = triton_kernels.top_k_gating(*given, k)
    expected = clk.top_k_gating(*[t.double() for t in given[:3]], k=k, noise=given[3].double(), backend="reference")
    torch.testing.assert_close(found[0].double(), expected[0], atol=2e-5, rtol=2e-5)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    return grids, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 3, 1), (17, 40, 22, 2), (128, 64, 32, 2)], ids=str)
def test_a_small_batch_is_one_program_and_nothing_else(shape, dtype, monkeypatch):
    grids, dispatched = launches_of(monkeypatch, shape, dtype)
    assert grids == [(1,)]
    assert dispatched == []  # the counts need no zeros to start from


@pytest.mark.parametrize(("shape", "programs"), [((129, 8, 22, 2), 9), ((20, 8, 33, 2), 2), (PUBLISHED, 4)], ids=str)
def test_larger_ones_share_the_work(shape, programs, monkeypatch):
    grids, dispatched = launches_of(monkeypatch, shape)
    assert grids == [(programs,)]
    assert dispatched == ["zeros"]


def test_a_published_step_in_16_bits_is_one_program(monkeypatch):
    grids, dispatched = launches_of(monkeypatch, PUBLISHED, torch.float16)
    assert grids == [(1,)]
    assert dispatched == []


@pytest.mark.parametrize(("dtype", "experts"), [(torch.float32, 129), (torch.float64, 33)], ids=str)
def test_more_experts_than_tiles_hold_are_an_error_or_a_warning(dtype, experts, monkeypatch):
    """Who asked for Triton hears why not; who did not is warned, and gets the reference."""
    for module in (triton_kernels, triton_backward):
        for name in ("gating_kernel", "row_gradient_kernel", "weight_gradient_kernel"):
            monkeypatch.setattr(module, name, None, raising=False)
    x, w_gate, w_noise, noise = cases.inputs(3, 5, experts, True, dtype)
    message = rf"on {experts} experts of {dtype}, only on up to {experts - 1}"
    with pytest.raises(
        ValueError, match=rf"^backend='triton' cannot run top_k_gating {message}; use backend='reference'$"
    ):
        clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend="triton")
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "reference"))
    monkeypatch.setattr(dispatch, "_chosen", {})
    with pytest.warns(RuntimeWarning, match=rf"reference on CUDA: its kernel cannot run {message}$"):
        cases.check_against_float64(None, (3, 5, experts, 2), True, dtype)
    with pytest.warns(RuntimeWarning, match=message):
        gates, _, _ = clk.top_k_gating(x.requires_grad_(), w_gate, w_noise, k=2, noise=noise)
    gates.square().sum().backward()
    assert x.grad.isfinite().all()
    with pytest.raises(TypeError):  # so that a launch would be seen
        clk.top_k_gating(x[:, :4], w_gate[:4, :9], k=2)


@pytest.mark.parametrize("noisy", [False, True])
def test_gradients(noisy):
    cases.check_gradients("triton", noisy)


def test_gradients_equal_autograd():
    cases.check_gradients_equal_autograd("triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("many_rows", [1, 1000])
@pytest.mark.parametrize("shape", [(19, 70, 17, 5), (33, 9, 40, 40), (3, 5, 128, 2), (1, 1, 1, 1)], ids=str)
def test_gradients_equal_float64(shape, many_rows, dtype, monkeypatch):
    monkeypatch.setattr(triton_backward, "MANY_ROWS", many_rows)
    rows, width, experts, k = shape
    given = cases.inputs(rows, width, experts, True, dtype)
    found = []
    for tensors, backend in ((given, "triton"), ([t.double() for t in given], "reference")):
        x, w_gate, w_noise, noise = tensors
        leaves = [t.detach().clone().requires_grad_() for t in (x.T.contiguous().T, w_gate, w_noise)]
        gates, _, _ = clk.top_k_gating(*leaves, k=k, noise=noise, backend=backend)
        upstream = torch.arange(gates.numel(), dtype=gates.dtype).reshape(gates.shape).cos()
        found.append(torch.autograd.grad((gates * upstream).sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert a.dtype == dtype
        tolerance = 2e-5 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(a.double(), b, atol=tolerance * b.abs().max().item(), rtol=tolerance)


def test_backward_is_two_launches(monkeypatch):
    launched = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(triton_backward, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("row_gradient_kernel", "weight_gradient_kernel"):
        monkeypatch.setattr(triton_backward, name, Counted(name))
    x, w_gate, w_noise, noise = cases.inputs(20, 40, 9)
    leaves = [t.requires_grad_() for t in (x, w_gate, w_noise)]
    gates, _, _ = clk.top_k_gating(*leaves, k=2, noise=noise, backend="triton")
    gates.square().sum().backward()
    assert launched == ["row_gradient_kernel", "weight_gradient_kernel"]


def test_opcheck():
    cases.check_opcheck("triton")
    x, w_gate, w_noise, noise = cases.inputs(5, 8, 6)
    gates, ids, _ = clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend="triton")
    op = library.operator("top_k_gating_backward", "triton")
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(op, (torch.rand_like(gates), x, w_gate, w_noise, noise, gates, ids, *needs))
    torch.library.opcheck(op, (torch.rand_like(gates), x, w_gate, None, None, gates, ids, True, True, False))


def test_compiles_without_a_break():
    cases.check_compile("triton")


def test_autocast():
    cases.check_autocast("triton")


def test_operator_refuses_what_does_not_fit():
    cases.check_errors("triton")

"""Top-k gating on a GPU: values, no waiting for the device, CUDA graphs."""

from __future__ import annotations

import gating_cases as cases
import pytest
import torch
from gpu_steps import capture, waiting_is_an_error

import cl_kernels as clk

pytestmark = pytest.mark.gpu

SHAPES = [*cases.SHAPES, (32, 768, 22, 2), (64, 768, 22, 2), (5000, 512, 64, 4), (300, 64, 128, 3)]


def inputs(shape, dtype):
    rows, width, experts, _ = shape
    return [t.cuda() for t in cases.inputs(rows, width, experts, True, dtype)]


def gradients(given, k, backend):
    x, w_gate, w_noise, noise = given
    leaves = [t.detach().clone().requires_grad_() for t in (x, w_gate, w_noise)]
    gates, ids, usage = clk.top_k_gating(*leaves, k=k, noise=noise, backend=backend)
    upstream = torch.arange(gates.numel(), dtype=gates.dtype, device="cuda").reshape(gates.shape).cos()
    return gates, ids, usage, torch.autograd.grad((gates * upstream).sum(), leaves)


@pytest.mark.parametrize(("shape", "dtype"), cases.fused(SHAPES, (torch.float32, torch.bfloat16, torch.float64)))
def test_equals_the_definition_in_float64(shape, dtype):
    given = inputs(shape, dtype)
    gates, ids, usage, found = gradients(given, shape[-1], "triton")
    exact = gradients([t.double() for t in given], shape[-1], "reference")
    # Logits closer than fp32 can tell may be chosen in another order: such rows are rare, and compared no further.
    same = (ids == exact[1]).all(1)
    assert same.sum() >= 0.999 * len(same)
    assert usage.sum() == ids.numel()
    assert torch.equal(usage, ids.flatten().bincount(minlength=shape[2]))
    torch.testing.assert_close(gates[same].double(), exact[0][same], atol=1e-4, rtol=1e-4)
    if same.all():
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float64: 1e-10}[dtype]
        for a, b in zip(found, exact[3], strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * b.norm()


def test_more_experts_warn_and_run_on_the_reference():
    given = inputs((300, 64, 200, 3), torch.float32)
    with pytest.warns(RuntimeWarning, match="cannot run on 200 experts"):
        found = gradients(given, 3, None)
    expected = gradients(given, 3, "reference")
    for a, b in zip((*found[:3], *found[3]), (*expected[:3], *expected[3]), strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device():
    given = inputs((64, 768, 22, 2), torch.bfloat16)

    def step():
        gradients(given, 2, "triton")

    step()  # compiles
    with waiting_is_an_error():
        step()


@pytest.mark.parametrize("rows", [32, 64])  # one program for all, and one for 16 each
def test_graph_counts_anew_in_every_replay(rows):
    given = inputs((rows, 768, 22, 2), torch.bfloat16)
    expected = gradients(given, 2, "triton")
    graph, found = capture(lambda: gradients(given, 2, "triton"))
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip((*found[:3], *found[3]), (*expected[:3], *expected[3]), strict=True):
        assert torch.equal(a, b)

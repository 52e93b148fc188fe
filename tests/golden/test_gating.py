"""The router of the reference blocks: gates, chosen experts and the gradients of both router weights, on every backend."""

from __future__ import annotations

import pytest
import torch
from golden_cases import load, names

import cl_kernels as clk

CASES = [(name, mode) for name in names("moe_block_E*") for mode in load(name)[1]["modes"]]


def check(name: str, mode: str, backend: str) -> None:
    values, _ = load(name)
    k, noise = int(mode.split(".")[0].removeprefix("k")), values.get(f"{mode}.noise")
    w_gate, w_noise = values["w_gate"].requires_grad_(), values["w_noise"].requires_grad_()
    gates, ids, usage = clk.top_k_gating(values["x1"][:, 0], w_gate, w_noise, k=k, noise=noise, backend=backend)
    assert torch.equal(ids, values[f"{mode}.indices"])
    assert torch.equal(usage, torch.bincount(ids.flatten(), minlength=w_gate.shape[1]))
    dense = torch.zeros_like(values[f"{mode}.gates"]).scatter(1, ids, gates)
    assert (dense - values[f"{mode}.gates"]).abs().max() <= 1e-5
    (dense * values[f"{mode}.grad_gates"]).sum().backward()
    for weight, expected in ((w_gate, values[f"{mode}.grad_w_gate"]), (w_noise, values[f"{mode}.grad_w_noise"])):
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_reference(name, mode):
    check(name, mode, "reference")


@pytest.mark.native
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_compiled(name, mode):
    check(name, mode, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_triton(name, mode):
    check(name, mode, "triton")

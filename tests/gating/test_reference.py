"""The definition of top-k gating against an independent formula, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

import cl_kernels as clk

MODES = ("clean", "noisy")


def inputs(rows=5, width=7, experts=6, mode="noisy", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    w_gate = torch.randn(width, experts, generator=generator, dtype=torch.float64).to(dtype)
    w_noise = torch.randn(width, experts, generator=generator, dtype=torch.float64).to(dtype)
    noise = torch.randn(rows, experts, generator=generator, dtype=torch.float64).to(dtype)
    return (x, w_gate, w_noise, noise) if mode == "noisy" else (x, w_gate, None, None)


def by_hand(x, w_gate, w_noise, noise, k):
    """One row at a time, in Python floats."""
    gates, ids, usage = [], [], [0] * w_gate.shape[1]
    for b in range(x.shape[0]):
        scores = []
        for e in range(w_gate.shape[1]):
            score = math.fsum(x[b, d].item() * w_gate[d, e].item() for d in range(x.shape[1]))
            if noise is not None:
                spread = math.fsum(x[b, d].item() * w_noise[d, e].item() for d in range(x.shape[1]))
                score += noise[b, e].item() * (math.log1p(math.exp(spread)) + 0.01)
            scores.append(score)
        kept = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
        total = math.fsum(math.exp(scores[e] - scores[kept[0]]) for e in kept)
        gates.append([math.exp(scores[e] - scores[kept[0]]) / total for e in kept])
        ids.append(kept)
        for e in kept:
            usage[e] += 1
    return torch.tensor(gates), torch.tensor(ids), torch.tensor(usage)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 2, 6])
def test_is_the_formula(mode, k):
    x, w_gate, w_noise, noise = inputs(mode=mode)
    gates, ids, usage = clk.top_k_gating(x, w_gate, w_noise, k=k, noise=noise, backend="reference")
    expected = by_hand(x, w_gate, w_noise, noise, k)
    torch.testing.assert_close(gates, expected[0].double(), atol=1e-7, rtol=1e-6)
    assert torch.equal(ids, expected[1])
    assert torch.equal(usage, expected[2])
    assert usage.dtype == ids.dtype == torch.int64


def test_equal_logits_go_to_the_lower_expert():
    gates, ids, usage = clk.top_k_gating(torch.randn(4, 3), torch.zeros(3, 5), k=2, backend="reference")
    assert ids.tolist() == [[0, 1]] * 4
    assert usage.tolist() == [4, 4, 0, 0, 0]
    assert torch.equal(gates, torch.full((4, 2), 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    x, w_gate, w_noise, noise = inputs(mode=mode)
    leaves = [t.requires_grad_() for t in (x, w_gate, w_noise) if t is not None]

    def gates(*given):
        return clk.top_k_gating(
            given[0], given[1], given[2] if noise is not None else None, k=2, noise=noise, backend="reference"
        )[0]

    assert torch.autograd.gradcheck(gates, leaves)


def test_the_noise_is_a_constant():
    x, w_gate, w_noise, noise = inputs()
    noise.requires_grad_()
    gates, _, _ = clk.top_k_gating(x, w_gate.requires_grad_(), w_noise, k=2, noise=noise)
    gates[:, 0].sum().backward()
    assert noise.grad is None


def test_no_noise_is_the_clean_gate():
    x, w_gate, w_noise, _ = inputs()
    with_weight = clk.top_k_gating(x, w_gate, w_noise, k=3)
    without = clk.top_k_gating(x, w_gate, k=3)
    for a, b in zip(with_weight, without, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5)}, ValueError, r"x: got shape \(5,\)"),
        ({"x": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"w_gate": torch.zeros(8, 6)}, ValueError, r"w_gate: got shape \(8, 6\), expected \(7, E\) for x \(5, 7\)"),
        ({"w_noise": torch.zeros(7, 5)}, ValueError, r"w_noise: got shape \(7, 5\).*\(7, 6\)"),
        ({"w_noise": None}, ValueError, "noise was given without w_noise"),
        ({"noise": torch.zeros(6, 5)}, ValueError, r"noise: got shape \(6, 5\), expected \(5, 6\)"),
        ({"noise": torch.zeros(5, 6, device="meta")}, ValueError, "noise is on meta, x on cpu"),
        ({"k": 0}, ValueError, "k: got 0, expected 1 to 6"),
        ({"k": 7}, ValueError, "k: got 7, expected 1 to 6"),
        ({"k": 2.0}, TypeError, "k: got float"),
        ({"w_gate": [1.0]}, TypeError, "w_gate: got list"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x, w_gate, w_noise, noise = inputs()
    call = {"x": x, "w_gate": w_gate, "w_noise": w_noise, "noise": noise, "k": 2} | change
    with pytest.raises(error, match=message):
        clk.top_k_gating(call.pop("x"), call.pop("w_gate"), call.pop("w_noise"), **call)

"""The modules: start values, routing, counting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import cl_kernels as clk
from cl_kernels.nn import DistillKL, MoEAdapter


def test_adapter_starts_as_zero_and_routes_by_token_zero():
    torch.manual_seed(0)
    adapter = MoEAdapter(8, 5, bottleneck=4, routers=2).eval()
    x, residual = torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    assert torch.equal(adapter(x, residual), residual)
    assert adapter.down_weight.abs().max() <= 1 / math.sqrt(8)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    gates, ids, _ = clk.top_k_gating(x[:, 0], adapter.w_gate[1], k=2)
    expected = residual.clone()
    for b in range(3):
        for j in range(2):
            e = ids[b, j]
            hidden = (x[b] @ adapter.down_weight[e].T + adapter.down_bias[e]).relu()
            expected[b] += gates[b, j] * 0.1 * (hidden @ adapter.up_weight[e].T + adapter.up_bias[e])
    torch.testing.assert_close(adapter(x, residual, task=1), expected)
    assert adapter.usage.sum() == 0


def test_adapter_trains_with_noise_dropout_and_counts():
    torch.manual_seed(0)
    adapter = MoEAdapter(8, 5, bottleneck=4).train()
    nn.init.normal_(adapter.up_weight)
    x = torch.randn(7, 3, 8)
    first, second = adapter(x), adapter(x)
    assert not torch.equal(first, second)
    assert adapter.usage.sum() == 2 * 7 * 2
    second.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0, name
    assert set(adapter.state_dict()) == {
        "down_weight", "down_bias", "up_weight", "up_bias", "w_gate", "w_noise", "usage"
    }  # fmt: skip


def test_adapter_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match="k: got 3, expected 1 to 2 experts"):
        MoEAdapter(8, 2, k=3)
    with pytest.raises(IndexError):
        MoEAdapter(8, 2)(torch.zeros(1, 1, 8), task=1)


def test_distillation_passes_its_options_on():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    weight = torch.rand(6)
    module = DistillKL(3.0, dim=0, target="kl", reduction="sum")
    expected = clk.distill_kl(
        student, teacher, temperature=3.0, dim=0, target="kl", reduction="sum", sample_weight=weight
    )
    assert torch.equal(module(student, teacher, weight), expected)

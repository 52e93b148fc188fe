"""The modules: start values, routing, counting, averaging, saving."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import cl_kernels as clk
from cl_kernels.nn import DistillKL, MoEAdapter, WeightAverager


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


class Tiny(nn.Module):
    def __init__(self, value: float, dtype=torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))
        self.tied = self.weight
        self.register_buffer("mean", torch.full((2,), value, dtype=dtype))
        self.register_buffer("steps", torch.tensor(int(value)))


def test_running_mean_of_all_snapshots():
    averager = WeightAverager(Tiny(1.0))
    for value in (2.0, 6.0, 11.0):
        averager.update(Tiny(value))
    assert averager.snapshots == 4
    result = Tiny(0.0)
    averager.copy_to(result)
    torch.testing.assert_close(result.weight.detach(), torch.full((3,), 5.0))
    torch.testing.assert_close(result.mean, torch.full((2,), 5.0))
    assert result.steps == 11  # integers cannot be averaged: the latest
    assert set(averager.tensors) == {"weight", "mean", "steps"}  # the tied parameter once


def test_exponential_average_and_interpolation():
    averager = WeightAverager(Tiny(0.0), decay=0.75)
    averager.update(Tiny(4.0))
    assert averager.tensors["weight"].tolist() == [1.0] * 3
    averager.interpolate(Tiny(3.0), 0.5)
    assert averager.tensors["weight"].tolist() == [2.0] * 3
    assert averager.snapshots == 2


def test_does_not_share_memory_with_the_model():
    model = Tiny(1.0)
    averager = WeightAverager(model)
    with torch.no_grad():
        model.weight.fill_(9.0)
        model.steps.fill_(9)
    assert averager.tensors["weight"].tolist() == [1.0] * 3
    assert averager.tensors["steps"] == 1


def test_sixteen_bit_models_average_in_fp32():
    averager = WeightAverager(Tiny(1.0, torch.bfloat16), decay=0.999)
    for _ in range(100):
        averager.update(Tiny(1.5, torch.bfloat16))
    assert averager.tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(averager.tensors["weight"], torch.full((3,), 1.5 - 0.5 * 0.999**100))
    result = Tiny(0.0, torch.bfloat16)
    averager.copy_to(result)
    assert result.weight.dtype == torch.bfloat16


def test_saved_and_continued_is_the_same():
    models = [Tiny(value) for value in (1.0, 5.0, 2.0, 8.0)]
    whole = WeightAverager(models[0])
    half = WeightAverager(models[0])
    for model in models[1:]:
        whole.update(model)
    half.update(models[1])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = WeightAverager(Tiny(0.0))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for model in models[2:]:
        resumed.update(model)
    assert resumed.snapshots == whole.snapshots == 4
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name])


def test_errors_name_the_difference():
    averager = WeightAverager(Tiny(1.0))
    with pytest.raises(ValueError, match="model: its tensors are not those of the average; first difference: bias"):
        averager.update(nn.Linear(3, 3))
    other = Tiny(1.0)
    other.weight = nn.Parameter(torch.zeros(4))
    other.tied = other.weight
    with pytest.raises(ValueError, match=r"model: weight is \(4,\), expected \(3,\)"):
        averager.update(other)
    with pytest.raises(ValueError, match=r"decay: got 1\.0"):
        WeightAverager(Tiny(1.0), decay=1.0)
    with pytest.raises(ValueError, match=r"decay: the state was made with 0\.5, this average has None"):
        averager.load_state_dict(WeightAverager(Tiny(1.0), decay=0.5).state_dict())

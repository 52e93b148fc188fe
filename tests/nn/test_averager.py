"""Averages of a model's weights: means, decay, Beta weights, a third model, 16 bits, host memory, saving."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from torch import nn

from cl_kernels.host_copy import HostCopy
from cl_kernels.nn import BetaWeights, WeightAverager


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
    with pytest.raises(ValueError, match=r"beta: the state was made with None, this average has BetaWeights"):
        WeightAverager(Tiny(1.0), beta=BetaWeights(0.5, 3)).load_state_dict(averager.state_dict())
    with pytest.raises(ValueError, match=r"decay and beta: got 0\.5 and BetaWeights"):
        WeightAverager(Tiny(1.0), decay=0.5, beta=BetaWeights(0.5, 3))
    with pytest.raises(ValueError, match=r"towards and pull: got NoneType and 0\.1, expected both or neither"):
        averager.update(Tiny(1.0), pull=0.1)
    with pytest.raises(ValueError, match="towards: its tensors are not those of the average"):
        averager.update(Tiny(1.0), towards=nn.Linear(1, 1), pull=0.1)
    with pytest.raises(ValueError, match="beta, snapshots: got 0, 3, expected both above 0"):
        BetaWeights(0, 3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_beta_weights_give_the_weighted_mean(beta):
    models = [1.0, -3.0, 4.0, 2.5, 10.0]
    averager = WeightAverager(Tiny(models[0]), beta=BetaWeights(beta, len(models)))
    for value in models[1:]:
        averager.update(Tiny(value))
    places = (torch.arange(len(models), dtype=torch.float64) + 0.5) / len(models)
    shape = torch.tensor(beta, dtype=torch.float64)
    density = torch.distributions.Beta(shape, shape).log_prob(places).exp()
    expected = (density * torch.tensor(models)).sum() / density.sum()
    torch.testing.assert_close(averager.tensors["weight"], torch.full((3,), float(expected)))
    with pytest.raises(ValueError, match="k: got 5, expected 0 to 4"):
        averager.update(Tiny(0.0))
    assert averager.snapshots == 5


def test_a_snapshot_and_a_pull_to_a_third_model_in_one_pass():
    averager, towards = WeightAverager(Tiny(0.0)), Tiny(-4.0)
    averager.update(Tiny(8.0), towards=towards, pull=0.25)
    assert averager.tensors["weight"].tolist() == [0.75 * 4.0 - 0.25 * 4.0] * 3
    averager.update(Tiny(8.0), towards={**WeightAverager(towards).tensors}, pull=0.25)
    torch.testing.assert_close(averager.tensors["mean"], torch.full((2,), 0.75 * (2.0 + 6.0 / 3) - 1.0))
    assert averager.snapshots == 3


def test_sixteen_bit_average_with_stochastic_rounding_moves_and_resumes():
    model = Wide(1.5)
    averager = WeightAverager(Wide(1.0), decay=0.999, dtype=None, rounding="stochastic", seed=3)
    for _ in range(400):
        averager.update(model)
    assert averager.tensors["weight"].dtype == torch.bfloat16
    expected = 1.5 - 0.5 * 0.999**400
    assert abs(averager.tensors["weight"].double().mean() - expected) < 0.01
    state = {**averager.state_dict(), "tensors": {n: t.clone() for n, t in averager.tensors.items()}}
    resumed = WeightAverager(Wide(0.0), decay=0.999, dtype=None, rounding="stochastic", seed=3)
    resumed.load_state_dict(state)
    for _ in range(5):
        averager.update(model)
        resumed.update(model)
    assert torch.equal(averager.tensors["weight"], resumed.tensors["weight"])


class Wide(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1024,), value, dtype=torch.bfloat16))


def test_nearest_sixteen_bit_average_warns(monkeypatch):
    from cl_kernels.weight_average import arguments

    monkeypatch.setattr(arguments, "_warned", set())
    averager = WeightAverager(Wide(1.0), decay=0.999, dtype=None)
    with pytest.warns(RuntimeWarning, match="can stand still"):
        averager.update(Wide(1.5))
    assert averager.tensors["weight"].eq(1).all()


def test_on_host_is_the_same_average():
    models = [Tiny(value, torch.bfloat16) for value in (1.0, 5.0, 2.0, 8.0)]
    beside, host = WeightAverager(models[0]), WeightAverager(models[0], on_host=True)
    for model in models[1:]:
        beside.update(model)
        host.update(model, towards=None)
    beside.update(models[0], towards=models[3], pull=0.125)
    host.update(models[0], towards=models[3], pull=0.125)
    assert host.snapshots == beside.snapshots == 5
    assert all(tensor.device.type == "cpu" for tensor in host.tensors.values())
    for name, tensor in beside.tensors.items():
        assert torch.equal(tensor, host.tensors[name])
    result = Tiny(0.0, torch.bfloat16)
    host.copy_to(result)
    assert torch.equal(result.weight, beside.tensors["weight"].bfloat16())
    resumed = WeightAverager(Tiny(0.0), on_host=True)
    resumed.load_state_dict(host.state_dict())
    assert torch.equal(resumed.tensors["weight"], host.tensors["weight"])


def test_on_host_training_goes_on_before_the_average_is_done(monkeypatch):
    """The copy is taken at once; the average may come later, and whoever reads it waits."""
    model, may_average = Tiny(3.0), threading.Event()
    averager = WeightAverager(Tiny(1.0), on_host=True)
    wait = HostCopy.wait
    monkeypatch.setattr(HostCopy, "wait", lambda self: (may_average.wait(60), wait(self))[1])
    averager.update(model)
    with torch.no_grad():
        model.weight.fill_(100.0)
    assert averager._tensors["weight"].tolist() == [1.0] * 3
    may_average.set()
    assert averager.tensors["weight"].tolist() == [2.0] * 3


def test_on_host_copies_are_made_for_the_models_that_come(monkeypatch):
    """The start may lie elsewhere than they do: an anchor on the host, of a model on a GPU."""
    made = []
    monkeypatch.setattr("cl_kernels.averager.HostCopy", lambda named: made.append(named) or HostCopy(named))
    averager, models = WeightAverager(Tiny(1.0), on_host=True), [Tiny(2.0), Tiny(3.0)]
    assert made == []
    for model in models:
        averager.update(model)
    assert averager.tensors["weight"].tolist() == [2.0] * 3
    assert [named["weight"] for named in made] == [models[0].weight]


def test_on_host_errors_come_out(monkeypatch):
    averager = WeightAverager(Tiny(1.0), on_host=True)

    def fail(self):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(HostCopy, "wait", fail)
    averager.update(Tiny(2.0))
    with pytest.raises(RuntimeError, match="the device is gone"):
        averager.state_dict()


@pytest.mark.gpu
def test_on_host_from_a_gpu():
    models = [Large(i).cuda() for i in range(4)]
    beside, host = WeightAverager(models[0]), WeightAverager(models[0], on_host=True)
    before = torch.cuda.memory_allocated()
    for model in models[1:]:
        copy = Large(0).cuda()
        copy.load_state_dict(model.state_dict())
        beside.update(model)
        host.update(copy)
        with torch.no_grad():
            copy.weight.fill_(-1.0)  # enqueued at once: may not overtake the copy
        del copy
    assert host.tensors["weight"].device.type == "cpu"
    assert host._host_copy.tensors["weight"].is_pinned()
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(host.tensors["weight"], beside.tensors["weight"].cpu())


class Large(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4_000_000, generator=generator))


def test_updates_allocate_nothing_tensor_sized():
    model, towards = Large(0), Large(1)
    averager = WeightAverager(model)
    averager.update(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        averager.update(model)
        averager.update(model, towards=towards, pull=0.5)
        averager.copy_to(model)
    assert sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0) == 0

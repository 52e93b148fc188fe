"""The profile of other people's modules: table, files, warnings, and errors that name what is wrong."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_kernels.nn import MoEAdapter
from cl_kernels.profile import Spread, Trust, Watch, profile_adapter
from cl_kernels.profile.launches import launches_among
from cl_kernels.profile.layers import OUTSIDE
from cl_kernels.profile.timing import interleaved

D, R, N = 16, 4, 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Bottleneck(nn.Module):
    """An adapter of somebody else: a residual bottleneck on the second layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(D, R, bias=False), nn.Linear(R, D, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


class Mixture(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.experts = inner, MoEAdapter(D, 4, bottleneck=R, k=2)

    def forward(self, x):
        return self.experts(x, self.inner(x))


def adapted(kind=Bottleneck):
    torch.manual_seed(0)
    model = Base().requires_grad_(False)
    model.layers[1] = kind(model.layers[1])
    return model


@pytest.fixture(scope="module")
def static():
    return profile_adapter(Base(), adapted(), [torch.randn(N, D)], static=True)


@pytest.fixture(scope="module")
def timed():
    model = adapted(Mixture)
    before = {name: value.clone() for name, value in model.state_dict().items() if "usage" not in name}
    found = profile_adapter(Base(), model, [torch.randn(N, 3, D)], optimizer=torch.optim.AdamW, repeats=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def test_rows_are_differences_from_the_same_layer_of_the_base(static):
    rows = {layer.name: layer for layer in static.layers}
    assert list(rows)[:2] == ["layers.0", "layers.1"]
    assert rows["layers.1.down"].mounted
    assert rows["layers.1.down"].depth == 1
    change = rows["layers.1"].difference()
    assert change["flops_forward"] == 2 * (2 * N * D * R)
    assert change["operations_forward"] == 3  # two products and a sum
    assert change["parameters"] == change["trainable"] == 2 * D * R
    # Weight gradients of both products and the gradient of the bottleneck; nothing flows back into the frozen layer.
    assert rows["layers.1"].cost.flops_backward == 3 * (2 * N * D * R)
    assert rows["layers.0"].cost.flops_backward == rows["layers.0"].cost.trainable == 0
    assert rows["layers.0"].difference()["operations_forward"] == 0


def test_a_static_profile_computes_nothing_and_says_so(static):
    assert static.device == "meta"
    assert not static.timed
    assert static.trust is static.ceilings is None
    assert all(layer.cost.seconds is None for layer in static.layers)
    assert "takes" not in static.headline()
    assert static.sides["eager"].whole.flops == static.sides["adapted"].whole.flops


def test_files_hold_what_the_profile_holds(static, timed, tmp_path):
    for profile, folder in ((static, tmp_path / "a"), (timed, tmp_path / "b")):
        files = profile.save(folder)
        assert {path.name for path in files} == {"profile.json", "profile.csv", "trace.json"}
        found = json.loads((folder / "profile.json").read_text())
        rows = list(csv.DictReader(io.StringIO((folder / "profile.csv").read_text())))
        assert [row["layer"] for row in rows] == [row["name"] for row in found["layers"]]
        for row, layer in zip(rows, profile.layers, strict=True):
            assert int(row["flops_forward"]) == layer.cost.flops_forward
            assert float(row["difference_operations_forward"]) == layer.difference()["operations_forward"]
        assert found["totals"]["adapted"]["trainable"] == profile.sides["adapted"].whole.trainable
        assert found["headline"] == profile.headline()
        assert found["memory"] == [o.live for o in profile.sides["adapted"].record.operations]
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        ranges = [event for event in events if event["ph"] == "X" and event["pid"] == 2]
        assert {"forward", "backward", "layers.1"} <= {event["name"] for event in ranges}
        operations = [event for event in ranges if "args" in event]
        assert len(operations) == len(profile.sides["adapted"].record.operations)
        assert sum(event["args"]["flops"] for event in operations) == profile.sides["adapted"].whole.flops
        outer = {event["name"]: event for event in ranges if event["name"] in ("forward", "backward")}
        for event in operations:
            if event["cat"] in outer:
                around = outer[event["cat"]]
                assert around["ts"] - 1e-3 <= event["ts"]
                assert event["ts"] + event["dur"] <= around["ts"] + around["dur"] + 1e-3


def test_a_timed_profile_compares_eager_and_fused_on_the_same_tensors(timed):
    assert set(timed.seconds) == {"frozen", "eager", "fused"}
    assert all(
        spread.repeats == 2 and 0 < spread.p20 <= spread.median <= spread.p80 for spread in timed.seconds.values()
    )
    eager, compiled, fused = timed.variants
    assert (eager.name, compiled.name, fused.name) == ("eager", "compiled", "fused")
    assert timed.variants_layer == "layers.1"
    assert compiled.reason == "not asked for"
    assert eager.operations > 2 * fused.operations > 0
    assert 0 <= fused.output_error < 1e-5
    assert 0 < fused.gradient_error < 1e-4
    assert timed.ceilings.flops_per_second > 0
    assert timed.sides["eager"].whole.waits == 4  # one nonzero for each expert
    assert timed.sides["adapted"].whole.waits == 0
    assert "% fewer operations" in timed.headline()
    assert timed.sides["adapted"].whole.operations_optimizer > 0


def test_the_adapters_contribution_is_seen_although_it_starts_as_zero(timed, monkeypatch):
    """Its error would be zero whatever the kernels did, were the up-projection left as it is."""
    from cl_kernels.profile import variants

    monkeypatch.setattr(
        variants, "_errors", lambda found, expected: (max(float(t.abs().max()) for t in found[1][-2:]), 0.0)
    )
    found = profile_adapter(Base(), adapted(Mixture), [torch.randn(N, 3, D)], repeats=1)
    assert found.variants[-1].output_error > 0


def test_the_table_names_every_layer(static):
    lines = static.text().splitlines()
    assert len(lines) == 1 + len(static.layers)
    assert lines[0].split()[0] == "layer"
    assert any(line.startswith("  layers.1.down") for line in lines)


def test_a_wrapper_that_renames_is_told_apart_by_its_inner_names():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = adapted()

        def forward(self, x):
            return self.model(x)

    found = profile_adapter(
        Base(), Wrapper(), [torch.randn(N, D)], static=True, rename=lambda name: name.removeprefix("model.")
    )
    assert [row.name for row in found.layers] == [
        "layers.0",
        "layers.1",
        "layers.1.inner",
        "layers.1.down",
        "layers.1.up",
        OUTSIDE,
    ]
    assert [row.mounted for row in found.layers] == [False, False, False, True, True, False]


def test_an_untrustworthy_time_is_said_to_be_one(timed):
    watch = Watch(torch.device("cpu"))
    quiet = Spread(1.0, 0.99, 1.01, 5)
    watch.load, watch.before = 0.0, Spread(1e-9, 1e-9, 1e-9, 3)
    slower = watch.stop({"step": quiet})
    assert len(slower.reasons) == 1
    assert "slower after" in slower.reasons[0]
    watch = Watch(torch.device("cpu"))
    watch.load, watch.cores = 7.5, 2
    found = watch.stop({"step": Spread(1.0, 0.5, 1.5, 5), "other": quiet})
    assert not found.trustworthy
    assert any("load average 7.5 on 2 cores" in reason for reason in found.reasons)
    assert any("1 of 2 times" in reason and "step" in reason for reason in found.reasons)
    warned = replace(timed, trust=found)
    assert warned.warning() in warned.headline()
    assert json.loads(json.dumps(warned.as_dict()))["trust"]["trustworthy"] is False
    believed = replace(timed, trust=Trust((), 0.1, 2, quiet, quiet))
    assert believed.warning() == ""
    assert believed.as_dict()["trust"]["trustworthy"] is True


def test_times_are_taken_in_turn():
    calls = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, torch.device("cpu"))
    assert calls == ["a", "b"] * 3
    assert found["a"].repeats == 2
    with pytest.raises(ValueError, match="repeats: expected a number >= 1, got 0"):
        interleaved({}, 0, torch.device("cpu"))


def test_launches_are_those_events_of_the_profiler():
    class Event:
        def __init__(self, key, count):
            self.key, self.count = key, count

    events = [
        Event("cudaLaunchKernel", 3),
        Event("aten::mm", 9),
        Event("cuLaunchKernelEx", 2),
        Event("cudaMemcpyAsync", 1),
    ]
    assert launches_among(events) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ("x", adapted(), [torch.zeros(1)]), TypeError, "base: expected a torch.nn.Module, got str"),
        (lambda: (Base(), adapted(), []), ValueError, "inputs: expected at least one tensor"),
        (lambda: (Base(), Base().requires_grad_(False), [torch.zeros(2, D)]), ValueError, "adapted: expected a trainable"),
        (lambda: (Base(), adapted(), [torch.zeros(2, D, device="meta")]), ValueError, "one device, got cpu, meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        profile_adapter(*arguments())


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "profile.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    assert (tmp_path / "adapter-profile" / "trace.json").is_file()
    rows = {layer.name: layer for layer in names["profile"].layers}
    assert rows["adapter"].mounted
    assert rows["adapter"].cost.flops_forward == 2 * 2 * 10 * (64 * 8 + 8 * 64)
    assert rows["self_attn"].difference()["flops_forward"] == 0
    assert "adapter" in capsys.readouterr().out

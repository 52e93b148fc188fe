"""The exact costs of every method's training step, against the committed ones: a regression fails here without a clock.

`clk bench --suite counts --output benchmarks/counts.json --no-record` renews them, on purpose, and the commit says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import cl_kernels as clk
from cl_kernels.nn import AdapterExperts
from cl_methods.bench.counting import Counting
from cl_methods.bench.history import Change, changes
from cl_methods.bench.measuring import live_memory
from cl_methods.bench.record import Record, new_record
from cl_methods.bench.rows import Row, over_ours
from cl_methods.bench.step import PUBLIC, StepOptions, count_method
from cl_methods.bench.suites import exact_rows
from cl_methods.bench.world import mini_world
from cl_methods.methods import METHODS

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "counts.json"
FROM_VERSION = ("operations", "saved_bytes")
"""What another release of torch may change without anybody having touched this repository."""


def committed() -> Record:
    return Record.from_dict(json.loads(COMMITTED.read_text()))


def differences(rows: list[Row]) -> list[str]:
    """What is not as committed; operations and saved bytes only under the release of torch that they were counted with."""
    wanted = {(row.case, row.implementation): row.exact for row in committed().rows}
    same = committed().versions["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    found = []
    for row in rows:
        expected = wanted[row.case, row.implementation]
        for name, value in row.exact.items():
            if value != expected[name] and (same or name not in FROM_VERSION):
                change = Change(row.case, name, expected[name], value)
                found.append(f"{change}; if that is meant, renew benchmarks/counts.json (see this file)")
    return found


def test_every_method_costs_what_is_committed() -> None:
    rows = exact_rows(StepOptions(time=False))
    assert {(row.case, row.implementation) for row in committed().rows} == {
        (row.case, row.implementation) for row in rows
    }
    assert differences(rows) == []
    assert {row.case.split(",")[0].split()[0] for row in rows} >= {n for n, m in METHODS.items() if m.trains}
    assert all(row.exact["synchronisations"] == 0 for row in rows if row.implementation == "ours")
    ratios = {case.split(",")[0]: row for (case, peer), row in over_ours(rows).items() if peer == PUBLIC}
    assert ratios["ZSCL"]["flops"] > 1.3  # at the published size 6.9
    assert ratios["MoE-Adapters"]["operations"] > 8
    public = {row.case.split(",")[0]: row.exact for row in rows if row.implementation == PUBLIC}
    assert (
        public["MoE-Adapters"]["synchronisations"] >= 5 * 5
    )  # three nonzeros and two validations in each of five blocks


def test_a_kernel_that_does_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = clk.feature_distill_kl

    def wasteful(student, *rest, **options):
        kernel(student.detach().clone(), *rest, **options)
        return kernel(student, *rest, **options)

    frugal = list(count_method("lwf", mini_world(), StepOptions(time=False)))
    monkeypatch.setattr(clk, "feature_distill_kl", wasteful)
    rows = list(count_method("lwf", mini_world(), StepOptions(time=False)))
    *_, flops = differences(
        rows
    )  # operations too, under the release of torch that the committed ones were counted with
    assert flops.startswith("lwf, mini: flops rose from 9,378,611,200 to")
    assert "renew benchmarks/counts.json" in flops
    before, now = (new_record("counts", committed().setting, found, torch.device("cpu")) for found in (frugal, rows))
    found = {change.cost: change for change in changes(before, now)}
    assert found.keys() == {"operations", "flops"}
    assert all(change.worse and change.case == "lwf, mini" for change in found.values())
    assert rows[0].exact["operations"] == frugal[0].exact["operations"] + 4


def test_counts_of_known_layers() -> None:
    """Against numbers from paper and pencil."""
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    with Counting([*layer.parameters(), x]) as counting:
        y = layer(x).relu()
        (y * 2).sum().backward()
    counts = counting.counts
    assert counts.flops == 2 * 4 * 6 * 5 * 2  # forward, gradient of the weight; x needs none
    assert counts.saved_bytes == 4 * 5 * 4  # the result of the ReLU; x and weight were there before
    assert counts.synchronisations == 0

    with Counting([x]) as counting:
        x.sum().item()
        x[x > 0].sum()
    assert counting.counts.synchronisations == 2


def test_memory_that_is_alive_at_once() -> None:
    """What was there before does not count, whether it is read, viewed or written; what has gone counts no longer."""
    x = torch.zeros(100, requires_grad=True)

    def step() -> None:
        x.grad = None
        (x * 2).exp().sum().backward()
        with torch.no_grad():
            x.view(10, 10).add_(1)

    # Never more than two of its three results and two gradients: each goes when the next one has been formed.
    assert 2 * 400 <= live_memory(step) <= 2 * 400 + 2 * 4
    step()  # the gradient of an earlier step is there, and goes
    assert 2 * 400 <= live_memory(step) <= 2 * 400 + 2 * 4
    assert live_memory(lambda: [torch.empty(50) for _ in range(3)]) == 600
    assert live_memory(lambda: [torch.empty(50).shape for _ in range(3)]) == 200


@pytest.mark.parametrize("trains_input", [False, True])
def test_counts_of_routed_adapters(trains_input: bool) -> None:
    B, L, D, E, R, k = 3, 5, 8, 4, 2, 2
    experts = AdapterExperts(D, E, R, k, 0.1, 0.0)
    gate = nn.Parameter(torch.randn(D, E))
    x = torch.randn(B, L, D, requires_grad=trains_input)
    given = [x, gate, *experts.parameters()]
    with Counting(given) as counting:
        experts.mix(x, None, gate, gate, training=False, noisy=False)[0].sum().backward()
    product = 2 * B * L * k * D * R
    router = 2 * B * D * E
    # Forward two products; backward the bottleneck's gradient, both weights', and x's if it is wanted; the router likewise.
    assert counting.counts.flops == product * (5 + trains_input) + router * (2 + trains_input)
    assert counting.counts.operations < 25


def test_counts_of_distillation() -> None:
    N, M, d = 6, 20, 4
    student, teacher, anchors = torch.randn(N, d, requires_grad=True), torch.randn(N, d), torch.randn(M, d)
    with Counting([student, teacher, anchors]) as counting:
        clk.feature_distill_kl(student, teacher, anchors, logit_scale=10.0).backward()
    assert counting.counts.flops == 3 * 2 * N * M * d  # logits of both, and the gradient, which comes with the loss

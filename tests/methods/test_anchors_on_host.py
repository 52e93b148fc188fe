"""Anchors in host memory: the same training to the bit, what they save beside the plan, and going on with them or without."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from shortened import shortened
from tiny_clip import build_backbone
from torch import Tensor
from trained import Batches, gone_on, learn, state, train, with_sgd

from cl_kernels import use_backend
from cl_methods.components import weights as weights_module
from cl_methods.components.host_weights import HostWeights
from cl_methods.components.weights import staging_bytes
from cl_methods.datasets.copying import TO_DEVICE
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Method
from cl_methods.seeding import seed_everything
from cl_methods.training.memory.levers import Levers, use_levers
from cl_methods.training.memory.live import LiveMemory
from cl_methods.training.memory.rehearsal import Rehearsal

WISE = {"ensemble": "wise", "average_every": 1}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: method, settings, how many copies of the trained weights are anchors
    "zscl": ("zscl", {"average_every": 1}, 1),
    "zscl, wise": ("zscl", {**WISE, "moving_average": "start"}, 1),
    "zscl, previous pull": ("zscl", {"moving_average": "previous", "average_every": 1}, 2),
    "zscl, mixed teacher": ("zscl", {"teacher": "mixed", "consolidation": 0.5}, 2),
    "zscl, previous teacher": ("zscl", {"teacher": "previous", **WISE}, 0),
    "zscl, merged": ("zscl", {"teacher": "previous", "ensemble": "none", "wise_merge": "zero_shot"}, 1),
    "weight_consolidation": ("weight_consolidation", {}, 1),
    "weight_ensemble, wise": ("weight_ensemble", WISE, 1),
    "ewc": ("ewc", {"strength": 100.0}, 2),
    "wise_ft": ("wise_ft", {}, 1),
    "wise_ft, start": ("wise_ft", {"towards": "start"}, 1),
    "mulki": ("mulki", {"average_every": 1}, 1),
    "mulki, asked in steps": ("mulki", {"average_every": 1, "teacher_view": "batch"}, 0),
    "clipood": ("clipood", {}, 0),
}
SLOTS_THERE = {"zscl, previous pull": 0.5, "zscl, merged": 0, "wise_ft": 0, "wise_ft, start": 0, "mulki": 0}
"""The share that has been taken of the slots for all anchors, where one has not been read in the first steps of a task."""


ALIKE = {
    "zscl, wise",
    "zscl, previous teacher",
    "weight_consolidation",
    "weight_ensemble, wise",
    "wise_ft, start",
    "clipood",
}
"""Cases whose anchors are kept and read as those of another one are."""


def cases(names: Iterable[str], alike: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in alike else ()) for name in names]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fraction of the model."""
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(weights_module._BUCKET, kind, 2500)


@pytest.fixture
def one_order() -> Iterator[None]:
    """Sums in the same order, wherever the anchor lies."""
    with use_backend("reference"):
        yield


def settings_of(case: str) -> Any:
    name, changes, _ = CASES[case]
    return dataclasses.replace(shortened(METHODS[name].default_config("mini")), iterations=3, **changes)


def build(case: str, reference: Reference, anchors: bool, averages: bool) -> Method:
    method = METHODS[CASES[case][0]](build_backbone(), settings_of(case), reference)
    method.offload_anchors, method.offload_averages = anchors, averages
    return method


def indexed(batches: list[Any]) -> list[Any]:
    return [dataclasses.replace(one, indices=torch.arange(6 * one.step, 6 * one.step + 6) % 24) for one in batches]


def after_first_task(case: str, reference: Reference, tasks: list[Task], batches: Batches) -> dict[str, Tensor]:
    return state(learn(build(case, reference, False, False), tasks[:1], steps_from(batches), 2))


def steps_from(batches: Batches) -> Batches:
    return lambda index, steps: indexed(batches(index, steps))


def in_second_task(
    method: Method, between: dict[str, Tensor], tasks: list[Task], batches: Batches
) -> torch.optim.Optimizer:
    """``method`` goes on after two steps of it."""
    method.load_state_dict(between)
    method.recall(tasks[:1])
    method.before_task(1, tasks[1])
    return train(method, indexed(batches(1, 2)))


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[HostWeights]]:
    """All weights on the host that there are."""
    made: list[weakref.ref[HostWeights]] = []
    begin = HostWeights.__init__

    def init(self: HostWeights, *given: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *given)

    monkeypatch.setattr(HostWeights, "__init__", init)

    def alive() -> list[HostWeights]:
        gc.collect()  # methods refer to themselves
        return [found for one in made if (found := one()) is not None]

    return alive


OnHost = Callable[[], list[HostWeights]]


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("case", cases(CASES, ALIKE))
def test_training_is_the_same_to_the_bit(
    case: str, tasks: list[Task], reference: Reference, batches: Batches, on_host: OnHost
) -> None:
    """Without, with anchors, with averages too; switched on, and off, where a run goes on in the middle of a task."""
    ends: list[dict[str, Tensor]] = []
    between = after_first_task(case, reference, tasks, batches)
    for before, after in (((0, 0), (0, 0)), ((1, 0), (1, 0)), ((0, 0), (1, 1)), ((1, 1), (0, 1))):
        method = build(case, reference, *map(bool, before))
        optimizer = in_second_task(method, between, tasks, batches)
        assert bool(on_host()) is bool(before[0] and CASES[case][2])
        if before != after:
            new = build(case, reference, *map(bool, after))
            method, optimizer = gone_on(new, tasks, between, state(method), optimizer.state_dict())
            del new
            assert bool(on_host()) is bool(after[0] and CASES[case][2])
        train(method, indexed(batches(1, 3))[2:], 2, optimizer)
        ends.append({f"middle {name}": value for name, value in state(method).items()})
        seed_everything(1)
        method.after_task(1, tasks[1])
        ends[-1].update(state(method))
        del method, optimizer
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for name, value in other.items():
            assert torch.equal(value, ends[0][name]), name


@pytest.mark.parametrize(
    "case",
    cases(
        ["zscl", *SLOTS_THERE, "zscl, mixed teacher", "zscl, previous teacher", "ewc"], {*ALIKE, "zscl", "zscl, merged"}
    ),
)
def test_the_plan_has_what_is_saved(
    case: str, tasks: list[Task], reference: Reference, batches: Batches, on_host: OnHost
) -> None:
    """Bytes of all tensors in the middle of a task, less those on the host, with anchors there and without."""
    between, bytes_of = after_first_task(case, reference, tasks, batches), []
    for anchors in (False, True):
        gc.collect()
        with LiveMemory() as memory:
            method = build(case, reference, anchors, False)
            optimizer = in_second_task(method, between, tasks, batches)
            gc.collect()
            held, taken = on_host(), sum(found.staging for found in on_host())
            bytes_of.append(memory.bytes - sum(value.nbytes for found in held for value in found.values()))
            if not anchors:
                planned = [dict(one) for one in method.anchors()]
                expected = sum(value.nbytes for one in planned for value in one.values())
                staging = sum(map(staging_bytes, planned))
                trained = sum(value.nbytes for _, value in method.trainable())
                assert expected == pytest.approx(CASES[case][2] * trained, rel=0.02)  # some of a model does not train
                del planned
            del method, optimizer, held
    assert bytes_of[0] - bytes_of[1] == expected - taken
    assert taken == staging * SLOTS_THERE.get(case, 1)
    rehearsal = Rehearsal(METHODS[CASES[case][0]], settings_of(case), build_backbone(), tasks, reference, None)
    assert (rehearsal.anchors, rehearsal.staging) == (expected, staging)


def test_on_a_cpu_nothing_goes_to_the_host(reference: Reference, tasks: list[Task]) -> None:
    method = build("zscl", reference, False, False)
    for offload in ("averages", "anchors", "all"):
        use_levers(method, Levers(offload=offload))  # type: ignore[arg-type]
        assert (method.offload_averages, method.offload_anchors) == (False, False)
    method.backbone.device = torch.device("cuda")
    asked = []
    for offload in ("none", "averages", "anchors", "all"):
        use_levers(method, Levers(offload=offload))  # type: ignore[arg-type]
        asked.append((method.offload_averages, method.offload_anchors))
    assert asked == [(False, False), (True, False), (False, True), (True, True)]


def test_a_teacher_stays_where_it_computes(
    tasks: list[Task], reference: Reference, batches: Batches, on_host: OnHost
) -> None:
    """The start of the first task is the teacher's own memory; of a later one the host has a copy, and the teacher its weights."""
    method = build("zscl", reference, True, True)
    teacher = {name: value.clone() for name, value in method.teacher.weights.items()}
    method.before_task(0, tasks[0])
    addresses = {value.data_ptr() for value in method.teacher.weights.values()}
    assert {value.data_ptr() for value in method.weights.start.values()} <= addresses
    assert method.anchors() == []
    assert on_host() == []
    train(method, indexed(batches(0, 2)))
    assert not {value.data_ptr() for value in method.averaged_weights().values()} & addresses
    method.after_task(0, tasks[0])
    method.before_task(1, tasks[1])
    assert on_host() == [method.weights.start]
    assert not {value.data_ptr() for value in method.weights.start.values()} & addresses
    assert all(torch.equal(value, teacher[name]) for name, value in method.teacher.weights.items())


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["zscl", "zscl, previous pull", "ewc", "mulki"])
def test_on_a_gpu(case: str, tasks: list[Task], reference: Reference, batches: Batches, on_host: OnHost) -> None:
    """Averages and anchors on the host: the weights of a run that has them beside the model, copies pinned, slots on the device."""
    ends = []
    for offload in ("none", "anchors", "all"):
        backbone = build_backbone()
        backbone.model.cuda()
        backbone.device = torch.device("cuda", torch.cuda.current_device())
        method = METHODS[CASES[case][0]](backbone, settings_of(case), reference)
        use_levers(method, Levers(offload=offload))  # type: ignore[arg-type]
        for index in range(2):
            method.before_task(index, tasks[index])
            steps = [on_device(one, backbone.device) for one in indexed(batches(index, 3))]
            train(method, steps, 0, with_sgd(method, 1e-2))  # which blows up no last bits of tiny gradients
            if index == 0:
                seed_everything(0)
                method.after_task(0, tasks[0])
        hosts = on_host()
        assert bool(hosts) is (offload != "none")
        assert all(value.is_pinned() for found in hosts for value in found.values())
        ends.append({key: value.cpu() for key, value in state(method).items()})
        del method, hosts
    for other in ends[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, ends[0][key], rtol=1e-4, atol=1e-5, msg=key)


def on_device(batch: Any, device: torch.device) -> Any:
    given = {name: getattr(batch, name) for name in TO_DEVICE}
    return dataclasses.replace(batch, **{name: one if one is None else one.to(device) for name, one in given.items()})

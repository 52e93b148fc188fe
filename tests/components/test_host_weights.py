"""Weights on the host in the arithmetic of anchors: the same bits as beside the model, in little memory, shared where equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from counted import Operations, only_new
from pretended_streams import Device
from torch import Tensor, nn

from cl_kernels import use_backend
from cl_methods.components import weights as weights_module
from cl_methods.components.host_weights import HostWeights
from cl_methods.components.task_weights import TaskWeights
from cl_methods.components.weights import (
    assign,
    consolidation_value,
    fold_consolidation_gradient,
    move_between,
    move_towards,
    sharing,
    staging_bytes,
)

CPU = torch.device("cpu")
SHAPES = [(9, 7), (5,), (31, 3), (), (2, 4, 8), (1,)]
BUCKET = 40
"""Of 227 scalars: pieces of every size, from single numbers to two thirds of a tensor."""


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in ("cpu", "cuda"):
        monkeypatch.setitem(weights_module._BUCKET, kind, BUCKET)
    with use_backend("reference"):
        yield


def named(dtype: torch.dtype, seed: int) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [(str(number), nn.Parameter(value)) for number, value in enumerate(values)]


def plain(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in named(dtype, seed)}


Work = Callable[[list[tuple[str, nn.Parameter]], Any, Any], Tensor | None]


def folded(parameters: list[tuple[str, nn.Parameter]], anchor: Any, importance: Any) -> None:
    fold_consolidation_gradient(parameters, anchor, 0.3, importance)


WORK: dict[str, Work] = {
    "value": lambda parameters, anchor, _: consolidation_value(parameters, anchor),
    "weighted value": consolidation_value,
    "gradient": lambda parameters, anchor, _: folded(parameters, anchor, None),
    "weighted gradient": folded,
    "move": lambda parameters, anchor, _: move_towards(parameters, anchor, 0.3),
    "move between": lambda parameters, anchor, other: move_between(parameters, anchor, 0.3, other, 0.2),
    "assign": lambda parameters, anchor, _: assign(parameters, anchor),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WORK)
def test_the_same_bits_as_beside_the_model(name: str, dtype: torch.dtype, device: str) -> None:
    """With one of the two on the host, with both, and with one that holds a tensor of somebody else's."""
    found = []
    for first, second in ((False, False), (True, False), (False, True), (True, True)):
        parameters = [(key, nn.Parameter(value.to(device))) for key, value in plain(dtype, 0).items()]
        gradients = {key: value.to(device) for key, value in plain(dtype, 1).items()}
        for key, value in parameters:
            value.grad = gradients[key] if key != "2" else None  # a tensor that took no part in the step
        others: list[Any] = [
            {key: value.abs().to(device) for key, value in plain(dtype, seed).items()} for seed in (2, 3)
        ]
        shared, read_on = others[0]["4"], parameters[0][1].device
        others = [HostWeights(one, read_on) if host else one for one, host in zip(others, (first, second), strict=True)]
        if first:
            others[0].share({"4": shared})
        value = WORK[name](parameters, *others)
        left = [one for _, parameter in parameters for one in (parameter.detach(), parameter.grad) if one is not None]
        found.append([*left, *([] if value is None else [value])])
    moved = [
        not torch.equal(parameter.cpu(), value)
        for (_, parameter), value in zip(parameters, plain(dtype, 0).values(), strict=True)
    ]
    assert all(moved) is not name.endswith(("value", "gradient"))
    for others in found[1:]:
        assert all(
            one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found[0], others, strict=True)
        )


@pytest.mark.parametrize("name", WORK)
def test_no_piece_is_read_early_or_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream beside another that copies: whoever reads a slot before its copy, or after the next has begun, is noticed."""
    ends = []
    for on_host in (False, True):
        parameters = named(torch.float64, 0)
        for key, value in parameters:
            value.grad = plain(torch.float64, 1)[key]
        others: list[Any] = [plain(torch.float64, 2), plain(torch.float64, 3)]
        with Device(monkeypatch) as device:
            if on_host:
                others = [HostWeights(one, CPU) for one in others]
            for _ in range(2):
                WORK[name](parameters, *others)
        copied = device.used.count(("side", "writes"))
        assert copied == (
            0 if not on_host or name == "assign" else (2 if "between" in name or "weighted" in name else 1) * 2 * 7
        )
        ends.append([one for _, value in parameters for one in (value.detach(), value.grad)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_folded_gradient_is_that_of_autograd(weighted: bool) -> None:
    """Of ``λ Σ Ω (θ − θ̄)²`` in float64, with anchor and importance on the host; and the value is that sum."""
    parameters, anchor = named(torch.float64, 0), plain(torch.float64, 1)
    importance = {key: value.square() for key, value in plain(torch.float64, 2).items()} if weighted else None
    terms = [
        (1 if importance is None else importance[key]) * (value - anchor[key]).square() for key, value in parameters
    ]
    total = torch.stack([term.sum() for term in terms]).sum()
    expected = torch.autograd.grad(0.7 * total, [value for _, value in parameters])
    host = HostWeights(anchor, CPU), None if importance is None else HostWeights(importance, CPU)
    for _, value in parameters:
        value.grad = torch.zeros_like(value)
    fold_consolidation_gradient(parameters, host[0], 0.7, host[1])
    for (_, value), gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-14, atol=1e-14)
    found = consolidation_value(parameters, *host)
    torch.testing.assert_close(found, total.detach(), rtol=1e-14, atol=0)
    assert not found.requires_grad


def test_one_pass_in_two_slots_and_a_bucket() -> None:
    """Per bucket one copy, one subtraction and one addition; memory beside the weights is that of three buckets."""
    parameters, anchor = named(torch.float32, 0), HostWeights(plain(torch.float32, 1), CPU)
    for _, value in parameters:
        value.grad = torch.zeros_like(value)
    given = [*anchor.values(), *(one for _, value in parameters for one in (value, value.grad))]
    buckets = len(list(weights_module._cut([list(anchor.values())], BUCKET)))
    assert buckets == 7
    for _ in range(2):  # the slots of the first pass serve the second
        with Operations() as operations, only_new(given) as memory:
            fold_consolidation_gradient(parameters, anchor, 0.5)
        passes = [name for name in operations.names if name.startswith("_foreach")]
        assert (
            passes.count("_foreach_copy_") == passes.count("_foreach_sub") == passes.count("_foreach_add_") == buckets
        )
        assert len(passes) == 3 * buckets
        assert memory.bytes == staging_bytes(anchor, "cpu")
        assert memory.peak <= memory.bytes + 4 * BUCKET
    assert anchor.staging == staging_bytes(anchor, "cpu") == staging_bytes(plain(torch.float32, 1)) == 2 * 4 * BUCKET


def test_a_mapping_of_copies_that_follow_nobody() -> None:
    weights = plain(torch.float32, 0)
    before = {name: value.clone() for name, value in weights.items()}
    host = HostWeights(weights, CPU)
    for value in weights.values():
        value.zero_()
    assert list(host) == list(before)
    assert len(host) == len(before)
    assert all(torch.equal(host[name], value) for name, value in before.items())
    assert host.device == CPU
    with pytest.raises(KeyError):
        move_towards(named(torch.float32, 0), HostWeights({"0": weights["0"]}, CPU), 0.5)


def test_only_equal_tensors_are_shared_with_the_host() -> None:
    one, other = plain(torch.float32, 0), plain(torch.float32, 0)
    other["1"] = other["1"] + 1
    host = HostWeights(one, CPU)
    found = sharing(host, other)
    assert {name for name, value in found.items() if value is not host[name]} == one.keys() - {"1"}


def begun(parameters: list[tuple[str, nn.Parameter]], **where: bool) -> TaskWeights:
    weights = TaskWeights()
    weights.begin(parameters, start=True, mean=True, pulled=True, **where)
    return weights


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("anchors", [False, True])
def test_a_task_remembers_the_same_wherever_it_lies(averages: bool, anchors: bool) -> None:
    """Mean, pulls and state are those of weights beside the model, and each of them goes on from the other's state."""
    ends = []
    for first, second in (
        ((False, False), (False, False)),
        ((averages, anchors), (False, False)),
        ((False, False), (averages, anchors)),
    ):
        parameters = named(torch.float32, 0)
        weights = begun(parameters, on_host=first[0], anchors_on_host=first[1])
        teacher = {name: value.detach().clone() for name, value in parameters}
        teacher["5"] += 1
        for turn in range(4):
            if turn == 2:  # as a run that is resumed
                saved = {name: value.clone() for name, value in weights.state_dict().items()}
                weights = begun(parameters, on_host=second[0], anchors_on_host=second[1])
                weights.load_state_dict(saved)
            weights.share_start(teacher, known_equal=False)
            with torch.no_grad():
                for _, value in parameters:
                    value += 0.1 * turn + 0.3 * value
            weights.pull_to_previous(parameters, 0.2)
            weights.take_snapshot(parameters, pull=0.1)
        assert isinstance(weights.pulled, HostWeights) is second[1]
        assert isinstance(weights.start, HostWeights) is second[1]
        assert weights.start["4"].data_ptr() == teacher["4"].data_ptr()
        assert weights.start["5"].data_ptr() != teacher["5"].data_ptr()
        assert [set(held) for held in weights.anchors()] == [{"5"}, set(teacher)]
        ends.append({name: value.clone() for name, value in weights.state_dict().items()})
        assert torch.equal(teacher["4"], plain(torch.float32, 0)["4"])
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        assert all(torch.equal(other[name], value) for name, value in ends[0].items())


def test_a_start_that_a_teacher_has_whole_is_not_on_the_host() -> None:
    parameters = named(torch.float32, 0)
    teacher = {name: value.detach().clone() for name, value in parameters}
    for known in (False, True):
        weights = begun(parameters, on_host=False, anchors_on_host=True)
        weights.share_start(teacher, known_equal=known)
        assert not isinstance(weights.start, HostWeights)
        assert [value.data_ptr() for value in weights.start.values()] == [
            value.data_ptr() for value in teacher.values()
        ]
        assert [set(held) for held in weights.anchors()] == [set(teacher)]  # those of the last pull

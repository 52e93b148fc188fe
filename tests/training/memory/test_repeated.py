"""Operations that are not worked out again: the same shapes, memory and counts as if they were, for much fewer of torch's own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from test_memory import KEPT, given, settings_of
from tiny_clip import build_backbone
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cl_methods.backbone import Precision
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.methods import METHODS
from cl_methods.training.memory.levers import Levers
from cl_methods.training.memory.planner import _Planner
from cl_methods.training.memory.rehearsal import Rehearsal
from cl_methods.training.planning.flop_count import FlopCount
from cl_methods.training.planning.repeated import Repeated

WAYS: tuple[tuple[MicroBatches | None, Precision], ...] = (
    (None, "fp32"),
    (MicroBatches(images=5, texts=2, keep_last=True), "bf16"),
    (MicroBatches(images=4, texts=4, blocks=True), "fp32"),
)


def run_again(self: Repeated, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
    return func(*args, **kwargs), 0


def rehearsal_of(name: str, **model: Any) -> Rehearsal:
    tasks, reference = given()
    return Rehearsal(METHODS[name], settings_of(name), build_backbone(**model), tasks, reference, None)


def everything(name: str, **model: Any) -> list[Any]:
    """What a rehearsal says of every way and precision."""
    found = rehearsal_of(name, **model)
    fixed = [found.model, found.carried, found.optimiser, found.gradients, found.averages, found.left_out]
    return [*fixed, *(found.step(parts, precision) for parts, precision in WAYS)]


@pytest.mark.parametrize(
    "name", [*KEPT, *(pytest.param(name, marks=pytest.mark.slow) for name in ("diki", "snd", "lwf"))]
)
def test_a_rehearsal_is_the_same_to_the_byte(name: str) -> None:
    found = everything(name)
    with mock.patch.object(Repeated, "run", run_again):
        assert everything(name) == found


@pytest.mark.slow
def test_deeper_towers_are_the_same_to_the_byte() -> None:
    found = everything("zscl", layers=5, width=48)
    with mock.patch.object(Repeated, "run", run_again):
        assert everything("zscl", layers=5, width=48) == found


def test_few_operations_of_a_second_step_are_worked_out() -> None:
    """Every way of cutting a batch is rehearsed while somebody waits."""
    found = rehearsal_of("zscl")
    found.step(None)
    work_out, run = FakeTensorMode.dispatch, Repeated.run
    with (
        mock.patch.object(FakeTensorMode, "dispatch", autospec=True, side_effect=work_out) as worked_out,
        mock.patch.object(Repeated, "run", autospec=True, side_effect=run) as asked,
    ):
        found.step(None)
    assert asked.call_count > 500
    assert worked_out.call_count < asked.call_count / 5


def test_results_have_the_shapes_strides_and_memory_that_they_would_have() -> None:
    fake = FakeTensorMode()
    with fake:
        x, out = torch.empty(3, 8, 10), torch.empty(3, 8, 10)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (torch.ops.aten.add.Tensor, (x, x), {}),
        (torch.ops.aten.clone.default, (x.transpose(0, 1),), {"memory_format": torch.contiguous_format}),
        (torch.ops.aten.transpose.int, (x, 0, 2), {}),
        (torch.ops.aten.slice.Tensor, (x, 1, 2, 6), {}),
        (torch.ops.aten.split.Tensor, (x, 3, 1), {}),
        (torch.ops.aten.native_layer_norm.default, (x, [10], None, None, 1e-5), {}),
        (torch.ops.aten._foreach_add.List, ([x, x], [x, x]), {}),
        (torch.ops.aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
    ]
    repeated = Repeated(fake)
    for func, args, kwargs in calls:
        expected, again = repeated.run(func, args, kwargs)[0], repeated.run(func, args, kwargs)[0]
        assert type(again) is type(expected), func
        several = isinstance(expected, tuple | list)
        for one, other in zip(expected, again, strict=True) if several else [(expected, again)]:
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                other.shape,
                other.stride(),
                other.dtype,
                other.device,
            )
            assert one.storage_offset() == other.storage_offset(), func
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes(), func
            shared = one.untyped_storage() is x.untyped_storage()
            assert (other.untyped_storage() is x.untyped_storage()) is shared, func
            assert shared or one.untyped_storage() is not other.untyped_storage(), func
    for _ in range(2):
        assert repeated.run(torch.ops.aten.mul_.Tensor, (out, x), {})[0] is out
        assert repeated.run(torch.ops.aten._foreach_mul_.Scalar, ([out, x], 2.0), {})[0] is None
    with fake:
        wider = torch.empty(3, 8, 20)[..., ::2]  # of the same shape, with other strides
    assert repeated.run(torch.ops.aten.slice.Tensor, (wider, 1, 2, 6), {})[0].stride() == (160, 20, 2)


def test_what_the_data_decides_and_what_has_data_is_worked_out() -> None:
    repeated = Repeated(None)
    blank, real = torch.empty(4, 4, device="meta"), torch.ones(2)
    for _ in range(2):
        assert torch.equal(repeated.run(torch.ops.aten.add.Tensor, (real, real), {})[0], real + real)
        real += 1
        with pytest.raises(NotImplementedError, match="nonzero"):
            repeated.run(torch.ops.aten.nonzero.default, (blank,), {})
        size = 4 * int(real[0])
        repeated.run(torch.ops.aten.resize_.default, (blank, [size, 4]), {})
        assert blank.shape == (size, 4)


def test_flops_of_calls_that_are_known_are_those_of_the_first() -> None:
    x, w = torch.empty(6, 5, device="meta"), torch.empty(7, 5, device="meta", requires_grad=True)
    totals = []
    for _ in range(3):
        with FlopCount() as count:
            F.linear(x, w).sum().backward()
        totals.append(count.total)
    assert totals == [2 * 2 * 6 * 5 * 7] * 3


def test_levers_that_could_not_fit_are_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights alone are more than the budget: no step in 16 bits has to be taken to know that it does not fit."""
    monkeypatch.setattr("cl_methods.training.memory.planner._process_bytes", lambda backbone: 0)
    found = rehearsal_of("finetune")
    planner = _Planner(found, build_backbone(), found.model)
    with mock.patch.object(found, "step", wraps=found.step) as step:
        assert planner.proposal(Levers()) == ""
        assert not step.called
        planner.budget = 4 * planner.smallest(Levers()).peak
        assert "--precision bf16" in planner.proposal(Levers())
        assert step.called

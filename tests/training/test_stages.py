"""Tasks in several stages: order of the hooks, one schedule and one optimiser each, their own images, resuming anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fakes import TinyConfig, TinyMethod, tiny_backbone, tiny_images, tiny_scenario

from cl_methods.datasets.images import DataError, Subset
from cl_methods.datasets.task import Task
from cl_methods.methods.base import Batch, Stage
from cl_methods.training.loop import StepReport
from cl_methods.training.schedule import warmup_cosine
from cl_methods.training.task import Continuation, TaskTraining

FIRST, SECOND = Stage("all", 4, 1e-2, 1, 8), Stage("balanced", 3, 5e-3, 2, 5)
TASKS = tiny_scenario().tasks


class StagedMethod(TinyMethod):
    """Trains on the task, then with a random half of its images, chosen when the second stage begins."""

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__(backbone, config)
        self.calls: list[str] = []
        self.batches: list[Batch] = []
        self.chosen = torch.arange(0)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        return FIRST, SECOND

    def before_task(self, index: int, task: Task) -> None:
        super().before_task(index, task)
        self.calls.append("before_task")

    def before_stage(self, stage: Stage) -> None:
        self.calls.append(f"before_stage {stage.name}")
        if stage is SECOND:
            self.chosen = torch.randperm(20)[:10]

    def training_images(self, task: Task):
        return task.train if self.stage is FIRST else Subset(task.train, self.chosen)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        assert self.stage is not None
        self.batches.append(batch)
        return super().loss(batch)

    def after_task(self, index: int, task: Task) -> None:
        self.calls.append("after_task")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), "chosen": self.chosen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self.chosen = state["chosen"]


def make_method() -> StagedMethod:
    torch.manual_seed(0)
    return StagedMethod(tiny_backbone(), TinyConfig())


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def test_every_stage_has_its_hook_its_schedule_its_optimiser_and_its_images() -> None:
    method, reports = make_method(), []
    TaskTraining(method, 0, TASKS, seed=3, on_step=reports.append).execute()
    assert method.calls == ["before_task", "before_stage all", "before_stage balanced", "after_task"]
    assert method.stage is None
    assert method.steps(TASKS[0]) == len(reports) == 9
    assert [report.step for report in reports] == [batch.step for batch in method.batches] == list(range(9))
    rates = [warmup_cosine(1e-2, step, 4, 1) for step in range(5)] + [
        warmup_cosine(5e-3, step, 3, 2) for step in range(4)
    ]
    assert [report.lr for report in reports] == rates
    assert [report.samples for report in reports] == [8] * 5 + [5] * 4
    assert len({id(report.optimizer) for report in reports}) == 2
    chosen = set(method.chosen.tolist())
    for batch in method.batches[5:]:
        assert batch.indices is not None
        assert set(method.chosen[batch.indices].tolist()) <= chosen
        assert torch.equal(batch.labels, TASKS[0].train.labels[method.chosen[batch.indices]])


@pytest.mark.parametrize("done", range(1, 9))
def test_resuming_in_either_stage_or_between_them_equals_not_stopping_to_the_bit(done: int) -> None:
    kept: list[Continuation] = []
    whole = make_method()

    def keep(report: StepReport) -> None:
        if report.step + 1 == done:
            moments = report.optimizer.state_dict()
            moments["state"] = {key: copied(value) for key, value in moments["state"].items()}
            kept.append(Continuation(done, copied(whole.state_dict()), moments))

    TaskTraining(whole, 0, TASKS, seed=3, on_step=keep).execute()
    resumed = make_method()
    TaskTraining(resumed, 0, TASKS, seed=3, continuation=kept[0]).execute()
    entered = {"before_stage balanced"} if done <= 5 else set()
    assert entered == {call for call in resumed.calls if call.startswith("before_stage")}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_later_stages_draw_another_order_and_an_empty_source_is_named() -> None:
    class Twice(StagedMethod):
        def stages(self, task: Task) -> tuple[Stage, ...]:
            return FIRST, FIRST

    method = Twice(tiny_backbone(), TinyConfig())
    TaskTraining(method, 0, TASKS, seed=3).execute()
    assert not torch.equal(method.batches[0].indices, method.batches[5].indices)
    empty = Task("empty", ("red",), ("a {}.",), *(tiny_images(count, 0) for count in (0, 1, 1)))
    with pytest.raises(DataError, match="task empty has no training images"):
        TaskTraining(make_method(), 0, [empty]).execute()

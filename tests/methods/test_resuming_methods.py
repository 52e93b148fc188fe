"""Every method of the package: stopped after a step and continued in another process's place, the same bits as undisturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shortened import shortened
from tiny_clip import build_backbone
from torch import Tensor
from trained import state

from cl_methods.datasets.task import Reference, Task
from cl_methods.evaluation.accuracy import EvaluationOptions, measure_row
from cl_methods.methods import METHODS, Method
from cl_methods.training.loop import StepReport
from cl_methods.training.task import Continuation, TaskTraining

TRAINED = [name for name, method in METHODS.items() if method.trains]


class StoppedError(Exception):
    """After the step at which a run is to end; holds what a checkpoint would."""


def build(name: str, reference: Reference) -> Method:
    torch.manual_seed(0)
    return METHODS[name](build_backbone(), shortened(METHODS[name].default_config("mini")), reference)


def finish(method: Method, tasks: list[Task]) -> tuple[dict[str, Tensor], list[Any]]:
    """The state, and what is measured with it."""
    return state(method), measure_row(method, tasks, len(tasks), EvaluationOptions(label_space="all"))


@pytest.mark.parametrize("name", TRAINED)
def test_stopped_after_a_step_and_continued(name: str, tasks: list[Task], reference: Reference) -> None:
    def stop(report: StepReport) -> None:
        if report.step + 1 == done:
            optimizer = {} if report.optimizer is None else report.optimizer.state_dict()
            raise StoppedError(Continuation(done, state(stopped), optimizer))

    whole, between = build(name, reference), None
    last = 0 if whole.joint else len(tasks) - 1
    for index in range(last + 1):
        between = state(whole) if index == last else None
        TaskTraining(whole, index, tasks).execute()
    expected, row = finish(whole, tasks)
    steps = whole.steps(tasks[last])
    assert steps > 1
    for done in sorted({1, steps - 1}):
        stopped, resumed = build(name, reference), build(name, reference)
        for method in (stopped, resumed):
            if last:
                method.load_state_dict(between)
                method.recall(tasks[:last])
        with pytest.raises(StoppedError) as found:
            TaskTraining(stopped, last, tasks, on_step=stop).execute()
        TaskTraining(resumed, last, tasks, continuation=found.value.args[0]).execute()
        ends, again = finish(resumed, tasks)
        assert ends.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(value, ends[key]), (done, key)
        assert again == row

"""The work of one task in one of several processes: a step of each of its stages, and the hooks around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Task
from cl_methods.forecast.sizes import shortened
from cl_methods.forecast.steps import step_work
from cl_methods.forecast.work import Work, WorkCount
from cl_methods.methods.base import Method

PROBED = 1024
"""Images of a task on which the hooks around it are counted; what they encode of every image grows with their number."""


@dataclass(frozen=True)
class StepKinds:
    """Steps of a stage that differ by who has seen their reference images; the same without any.

    Attributes:
        new, again, old: no frozen model has; those of earlier tasks have, of which some stay; all have.
        saved: bytes that a step keeps for its backward pass.
    """

    new: Work
    again: Work
    old: Work
    saved: int


@dataclass
class TaskWork:
    """What was counted of a task.

    Attributes:
        steps: of each stage; in closed form a batch of the one pass.
        around: of the hooks, with :data:`PROBED` images.
        encodings: of each of these images in the hooks.
        trainable: parameters that the optimiser changes, at most.
    """

    steps: list[StepKinds] = field(default_factory=list)
    around: Work = field(default_factory=Work)
    encodings: int = 0
    trainable: int = 0

    def mixed(self, other: TaskWork, share: float) -> TaskWork:
        """``share`` of ``other``, the rest of this one."""
        own = 1 - share
        pairs = [
            StepKinds(
                a.new * own + b.new * share,
                a.again * own + b.again * share,
                a.old * own + b.old * share,
                round(a.saved * own + b.saved * share),
            )
            for a, b in zip(self.steps, other.steps, strict=True)
        ]
        around = self.around * own + other.around * share
        return TaskWork(pairs, around, max(self.encodings, other.encodings), max(self.trainable, other.trainable))


def count_task(method: Method, index: int, task: Task, processes: int, lists: bool, sharded: bool = False) -> TaskWork:
    """Bring a method through a task on tensors without data, and count.

    Args:
        method: on the device ``meta``, after the tasks before.
        index: of the task.
        task: of which a few images are looked at.
        processes: that compute together.
        lists: optimisers of torch work on lists of tensors.
        sharded: whether each process updates some rows of the weights alone.
    """
    found, blank = TaskWork(), shortened(task, PROBED)
    _hook(found, lambda: method.before_task(index, blank))
    if method.closed_form:
        work, saved = step_work(method, blank, method.config.batch_size, 0, None, processes)
        found.steps.append(StepKinds(work, work, work, saved))
        return found  # the head's solution needs the labels
    for stage in method.stages(blank):
        method.stage = stage
        _hook(found, lambda stage=stage: method.before_stage(stage))  # type: ignore[misc]
        found.steps.append(_stage(method, blank, stage.batch_size, processes, lists, index, sharded))
        found.trainable = max(found.trainable, sum(value.numel() for _, value in method.trainable()))
    method.stage = None
    _hook(found, lambda: method.after_task(index, blank))
    return found


def _stage(method: Method, task: Task, size: int, processes: int, lists: bool, index: int, sharded: bool) -> StepKinds:
    optimizer = method.optimizer()
    if lists and isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        for group in optimizer.param_groups:
            group["foreach"] = True

    def step(number: int, task_index: int = index) -> tuple[Work, int]:
        # reference images that no other task has shown to a teacher that may still know them
        with torch.random.fork_rng(devices=[]):  # nor other texts than the other steps draw
            torch.manual_seed(0)
            place = 2 * task_index + number
            return step_work(method, task, size, number, optimizer, processes, place, sharded=sharded)

    step(0)  # optimisers make their state, averages begin
    again, _ = step(1, index - 1) if index else (None, 0)
    new, saved = step(1)
    if not method.uses_reference or method.reference_source(task) is None:
        return StepKinds(new, new, new, saved)
    old, saved = step(1)  # the same reference images, seen before
    return StepKinds(new, again or new, old, saved)


def _hook(found: TaskWork, hook: Callable[[], Any]) -> None:
    """Add what a hook does, and how often it encodes each image."""
    counting, encoded = WorkCount(), 0
    plain = Backbone.encode_images

    def encode(self: Backbone, batch: Tensor, **options: Any) -> Tensor:
        nonlocal encoded
        encoded += len(batch)
        return plain(self, batch, **options)

    with counting, mock.patch.object(Backbone, "encode_images", encode):
        hook()
    times = encoded // PROBED
    found.encodings += times
    found.around += Work(counting.calls, images=times * PROBED)

"""A training step of one of the methods, taken outside of a run: prepared, counted, timed, or differentiated only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods import ranks
from cl_methods.bench.world import World, fresh, without_values
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch, Method
from cl_methods.methods.base import Stage
from cl_methods.seeding import seed_everything, step_seed
from cl_methods.training.data import TrainingSteps, one_pass, training_batches
from cl_methods.training.gradients import average_gradients

COUNTED = 1
"""The step that is looked at: not the first one, where optimisers create their moments and averages take a snapshot."""


@dataclass
class OwnStep:
    """One step of a stage of a method that has been brought to the middle of a task.

    Attributes:
        method: after ``before_task`` and ``before_stage``.
        batch: of the step.
        optimizer: of the stage; None for methods in closed form.
        task_index: 0-based, of the task that is being learnt.
        forget: called before every step, to drop what it would find cached; None keeps it.
    """

    method: Method
    batch: Batch
    optimizer: torch.optim.Optimizer | None
    task_index: int = 0
    forget: Callable[[], None] | None = None

    def loss(self) -> Tensor:
        """The loss of the batch, random numbers seeded as a run does."""
        if self.forget is not None:
            self.forget()
        seed_everything(step_seed(0, self.task_index, COUNTED))
        return self.method.loss(self.batch)["loss"]

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the gradient of every trained tensor; the weights stay as they are."""
        self._clear()
        loss = self.loss()
        loss.backward()
        self.method.before_step(self.batch)
        found = {name: value.grad.detach().clone() for name, value in self.method.trainable() if value.grad is not None}
        self._clear()
        return loss.detach(), found

    def run(self) -> None:
        """The whole step: gradients, their mean over processes, hooks, optimiser. In closed form: one batch is learnt."""
        if self.optimizer is None:
            seed_everything(step_seed(0, self.task_index, COUNTED))
            self.method.learn(self.batch)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        if ranks.count() > 1:
            average_gradients(self.method.trainable())
        self.method.before_step(self.batch)
        self.optimizer.step()
        self.method.after_step(COUNTED)

    def run_shapes(self) -> None:
        """The step without values: ``after_step`` left out, because averages compare addresses, which fake weights lack."""
        if self.optimizer is None:
            self.method.learn(self.batch)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.method.before_step(self.batch)
        self.optimizer.step()

    def on_device(self) -> Iterator[Tensor]:
        """Weights, buffers and the batch: what lies on the device before the step."""
        model, batch = self.method.backbone.model, self.batch
        given = (batch.images, batch.labels, batch.reference_images)
        yield from itertools.chain(model.parameters(), model.buffers())
        yield from (value for _, value in self.method.trainable())
        yield from (tensor for tensor in given if tensor is not None)

    def _clear(self) -> None:
        for _, value in self.method.trainable():
            value.grad = None


def own_steps(
    name: str, world: World, settings: Any = None, batch_size: int | None = None, task: int = 2
) -> dict[str, OwnStep]:
    """A prepared step per stage of a method, by the stage's name.

    Where tensors have values, a step of every stage of the tasks before has been taken, so that whatever a method keeps between
    tasks is there, and the step is one of the second task or of ``task``. Where they have none, it is one of the first.

    Args:
        name: of the method.
        world: model and tasks.
        settings: of the method; its file's for `mini` or `mtil` when None.
        batch_size: images per step, of the task and of reference data each; the settings' when None.
        task: whose step it is, counted from 1.

    Raises:
        ValueError: ``world`` has no such task.
    """
    if not 1 <= task <= len(world.tasks):
        raise ValueError(f"task: expected 1 to {len(world.tasks)}, got {task}")
    kind = METHODS[name]
    settings = settings if settings is not None else kind.default_config("mini" if world.model == "mini" else "mtil")
    settings = _brief(settings, batch_size)
    seed_everything(0)
    method = kind(world.backbone(), settings, world.reference)
    if world.shapes:
        return dict(_stages_without_values(method, world))
    index = 0 if method.joint else task - 1
    for earlier in range(index):
        _learn(method, world.tasks, earlier)
    method.before_task(index, world.tasks[index])
    return _stages(method, world.tasks, index)


def _brief(settings: Any, batch_size: int | None) -> Any:
    """The settings with a detector of tasks that needs no weights on disk and trains for two steps: it is no part of a step."""
    if getattr(settings, "detection", None) == "ddas":
        changes = {"features": "backbone", "iterations": 2, "generic_iterations": 2, "augment": False}
        settings = replace(settings, ddas=replace(settings.ddas, **changes))
    if batch_size is not None:
        names = ("batch_size", "reference_batch_size")
        settings = replace(settings, **{name: batch_size for name in names if hasattr(settings, name)})
    return settings


def _learn(method: Method, tasks: tuple[Task, ...], index: int) -> None:
    method.before_task(index, tasks[index])
    for step in _stages(method, tasks, index).values():
        step.run()
    seed_everything(0)
    method.after_task(index, tasks[index])


def _stages(method: Method, tasks: tuple[Task, ...], index: int) -> dict[str, OwnStep]:
    """A step that is ready per stage; those of earlier stages have been done, so that their successors find what they need."""
    if method.closed_form:
        return {"pass": OwnStep(method, _closed_form_batch(method, tasks[index], index), None, index)}
    found: dict[str, OwnStep] = {}
    for number, stage in enumerate(method.stages(tasks[index])):
        method.stage = stage
        method.before_stage(stage)
        step = OwnStep(method, _batch(method, tasks, index, stage, number), method.optimizer(), index)
        step.run()
        found[stage.name] = step
    return found


def _stages_without_values(method: Method, world: World) -> Iterator[tuple[str, OwnStep]]:
    task = world.tasks[0]
    method.before_task(0, task)
    for part in vars(method).values():
        if isinstance(part, nn.Module):
            without_values(part)
    size, settings = world.image_size, method.config

    def batch(count: int) -> Batch:
        references = getattr(settings, "reference_batch_size", count) if method.uses_reference else 0
        with fresh(True):
            images = torch.empty(count, 3, size, size)
            shown = torch.empty(references, 3, size, size) if references else None
        rows = torch.arange(references) if references else None
        return Batch(
            images, torch.arange(count) % len(task.class_names), COUNTED, shown, rows, task, torch.arange(count)
        )

    if method.closed_form:
        yield "pass", OwnStep(method, batch(settings.batch_size), None)
        return
    for stage in method.stages(task):
        method.stage = stage
        method.before_stage(stage)
        yield stage.name, OwnStep(method, batch(stage.batch_size), method.optimizer())


def _batch(method: Method, tasks: tuple[Task, ...], index: int, stage: Stage, number: int) -> Batch:
    steps = TrainingSteps.of_stage(method, tasks, index, stage, seed=0, number=number)
    device = method.backbone.device
    return next(iter(training_batches(steps, start_step=COUNTED, iterations=COUNTED, device=device)))


def _closed_form_batch(method: Method, task: Task, index: int) -> Batch:
    transform = method.backbone.eval_transform
    size, device = method.config.batch_size, method.backbone.device
    return next(iter(one_pass(task, task_index=index, seed=0, batch_size=size, transform=transform, device=device)))

"""One task from its first hook to its last: stages of optimiser steps, or one pass for methods in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.datasets.task import Task
from cl_methods.methods.base import Method, Stage
from cl_methods.seeding import derive_seed, seed_everything
from cl_methods.sharding import load_method_state, load_optimizer_state
from cl_methods.training.data import TrainingSteps, one_pass, training_batches
from cl_methods.training.loop import StepReport, learn_from_batches, train_on_batches
from cl_methods.training.memory.optimizer_state import OptimizerState, with_state


@dataclass(frozen=True)
class Continuation:
    """The middle of a task, as a checkpoint holds it.

    Attributes:
        start_step: first step of the task that has not been done.
        method_state: :meth:`Method.state_dict` at that moment.
        optimizer_state: the ``state_dict`` of the present stage's optimiser.
    """

    start_step: int
    method_state: dict[str, Tensor]
    optimizer_state: dict[str, Any]


@dataclass(frozen=True)
class TaskTraining:
    """One task of a run, as it is about to be learnt or finished.

    Attributes:
        method: carrying what earlier tasks left.
        index: 0-based position of the task in ``tasks``; 0 for joint training.
        tasks: the whole sequence.
        seed: of the run.
        workers: data-loading processes.
        continuation: to continue in the middle of the task; ``method`` is then in the state before the task.
        optimizer_state: where the optimiser's state lies, see :mod:`cl_methods.training.memory.optimizer_state`.
        on_start: called when the trainable parameters of the first stage to be done are known.
        on_step: called after each step.
        learnt_before: tasks that ``method`` has learnt in another run; hooks and random numbers count them.
    """

    method: Method
    index: int
    tasks: Sequence[Task]
    seed: int = 0
    workers: int = 0
    continuation: Continuation | None = None
    optimizer_state: OptimizerState = "fp32"
    on_start: Callable[[], None] | None = None
    on_step: Callable[[StepReport], None] | None = None
    learnt_before: int = 0

    @property
    def number(self) -> int:
        """0-based position of the task in all that the method learns."""
        return self.learnt_before + self.index

    @property
    def task(self) -> Task:
        """The task itself."""
        return self.tasks[self.index]

    @property
    def done(self) -> int:
        """Steps of the task that an earlier process has done."""
        return 0 if self.continuation is None else self.continuation.start_step

    def execute(self) -> None:
        """Train the method on the task: ``before_task``, every stage's optimiser steps or the one pass, ``after_task``.

        Random numbers in the hooks are seeded from (seed, task) as well, so nothing depends on what ran before.

        Raises:
            NonFiniteLossError: see :func:`~cl_methods.training.loop.train_on_batches`.
            DataError: an image cannot be read.
        """
        self._seed("before task")
        self.method.before_task(self.number, self.task)
        if self.continuation is not None:
            load_method_state(self.method, self.continuation.method_state)
        if self.method.closed_form:
            self._started()
            self._learn()
        else:
            self._optimise()
        self._seed("after task")
        self.method.after_task(self.number, self.task)

    def _seed(self, *hook: str | int) -> None:
        seed_everything(derive_seed(self.seed, *hook, self.number))

    def _started(self) -> None:
        if self.on_start is not None:
            self.on_start()

    def _learn(self) -> None:
        batches = one_pass(
            self.task,
            task_index=self.number,
            seed=self.seed,
            batch_size=self.method.config.batch_size,
            transform=self.method.backbone.eval_transform,
            start_step=self.done,
            device=self.method.backbone.device,
            workers=self.workers,
        )
        learn_from_batches(
            self.method, batches, seed=self.seed, task_index=self.number, on_step=self.on_step, task_name=self.task.name
        )

    def _optimise(self) -> None:
        first_step, started = 0, False
        for number, stage in enumerate(self.method.stages(self.task)):
            if self.done < first_step + stage.steps:
                self.method.stage = stage
                optimizer = self._enter(number, stage, first_step)
                if not started:
                    self._started()
                    started = True
                self._steps(number, stage, first_step, optimizer)
            first_step += stage.steps
        self.method.stage = None

    def _enter(self, number: int, stage: Stage, first_step: int) -> torch.optim.Optimizer:
        """Begin a stage, or go on in its middle, where the method's state holds what ``before_stage`` decided."""
        if self.done <= first_step:
            self._seed("before stage", number)
            self.method.before_stage(stage)
            return with_state(self.method.optimizer(), self.optimizer_state)
        optimizer = with_state(self.method.optimizer(), self.optimizer_state)
        assert self.continuation is not None
        load_optimizer_state(optimizer, self.continuation.optimizer_state)
        return optimizer

    def _steps(self, number: int, stage: Stage, first_step: int, optimizer: torch.optim.Optimizer) -> None:
        method = self.method
        steps = TrainingSteps.of_stage(
            method,
            self.tasks,
            self.index,
            stage,
            seed=self.seed,
            number=number,
            first_step=first_step,
            learnt_before=self.learnt_before,
        )
        start_step = max(self.done, first_step)
        batches = training_batches(
            steps,
            start_step=start_step,
            iterations=first_step + stage.iterations,
            device=method.backbone.device,
            workers=self.workers,
        )
        train_on_batches(
            method,
            batches,
            iterations=stage.iterations,
            warmup=stage.warmup,
            lr=stage.lr,
            seed=self.seed,
            task_index=self.number,
            start_step=start_step,
            first_step=first_step,
            optimizer=optimizer,
            on_step=self.on_step,
            task_name="all tasks" if method.joint else self.task.name,
        )


def use_micro_batches(method: Method, parts: MicroBatches | None) -> None:
    """Let the method's backbone, and the copies of it that it holds as teachers, encode in these parts from now on."""
    for backbone in backbones(method):
        backbone.micro_batches = parts


def backbones(method: Method) -> list[Backbone]:
    """The method's backbone, and those that it holds as teachers."""
    found = [method.backbone]
    for value in vars(method).values():
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
        found += [held for held in (value, *inner) if isinstance(held, Backbone)]
    return list({id(one): one for one in found}.values())

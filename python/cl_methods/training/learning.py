"""One task of a run being learnt: reported, timed, saved on the way and at its end, stopped when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cl_methods import ranks
from cl_methods.datasets.task import Task
from cl_methods.methods import Method
from cl_methods.sharding import whole_state
from cl_methods.training.building import check_frozen_images
from cl_methods.training.checkpoints import RunDirectory, TrainingProgress
from cl_methods.training.checkpoints.restoring import Restored
from cl_methods.training.config import RunConfig
from cl_methods.training.failures import require_finite
from cl_methods.training.loop import StepReport
from cl_methods.training.progress import RunProgress
from cl_methods.training.rows import Rows
from cl_methods.training.signals import StoppedError
from cl_methods.training.task import Continuation, TaskTraining


@dataclass
class Learning:
    """The training of one run's tasks.

    Attributes:
        config: of the run.
        method: what learns.
        tasks: the whole sequence.
        directory: where checkpoints go.
        reporter: what is told about every step.
        rows: the accuracies known so far, kept with every checkpoint.
        progress: what training has cost, counted on here.
        stopping: whether somebody has asked the run to stop.
        learnt_before: tasks that the method has learnt in another run.
    """

    config: RunConfig
    method: Method
    tasks: Sequence[Task]
    directory: RunDirectory
    reporter: RunProgress
    rows: Rows
    progress: TrainingProgress
    stopping: Callable[[], bool]
    learnt_before: int = 0
    _clock: float = 0.0

    def learn(self, index: int, sessions: int, steps: int, restored: Restored | None) -> None:
        """Train on task ``index`` and write its checkpoint.

        Args:
            index: 0-based task; 0 for joint training.
            sessions: tasks that are trained in the run.
            steps: optimiser steps or batches of this one.
            restored: where to go on inside it; None: at its beginning.

        Raises:
            StoppedError: somebody asked for it; a checkpoint has been written.
            NonFiniteLossError: training diverged.
            DataError: an image cannot be read.
            WriteError: a checkpoint cannot be written.
        """
        method, name = self.method, self._name(index)
        continuation = None
        if restored is not None and restored.checkpoint is not None and restored.method_state is not None:
            done_before = restored.checkpoint.step or 0
            continuation = Continuation(done_before, restored.method_state, restored.optimizer_state or {})
        else:
            self.progress.seconds.append(0.0)
        self._clock = time.perf_counter()
        watched: list[tuple[str, torch.Tensor]] = []
        watched_of: torch.optim.Optimizer | None = None

        def on_start() -> None:
            if len(self.progress.trainable_parameters) == index:
                trained = sum(parameter.numel() for _, parameter in method.trainable())
                self.progress.trainable_parameters.append(trained)
            check_frozen_images(method)
            self.reporter.task_started(name, index + 1, sessions, steps, continuation.start_step if continuation else 0)

        def on_step(report: StepReport) -> None:
            nonlocal watched, watched_of
            if report.optimizer is not watched_of:  # a stage begins
                watched, watched_of = list(method.trainable()), report.optimizer
            self.progress.samples += report.samples
            self.reporter.step(report)
            done, every = report.step + 1, self.config.checkpoint.every
            stop = ranks.anyone(self.stopping())
            if stop or (every and done % every == 0 and done < steps):
                report.log.check()  # never store weights that a loss has already shown to be broken
                require_finite(watched, name, report.step)
                self._count_time(index)
                self._save(index, done, report.optimizer.state_dict() if report.optimizer is not None else None)
            if stop:
                raise StoppedError(f"stopped after step {done} of task {name}; continue with --resume")

        training = TaskTraining(
            method,
            index,
            self.tasks,
            seed=self.config.seed,
            workers=self.config.workers,
            continuation=continuation,
            optimizer_state=self.config.optimizer_state,
            on_start=on_start,
            on_step=on_step,
            learnt_before=self.learnt_before,
        )
        training.execute()
        require_finite(method.state_dict().items() if method.closed_form else watched, name, steps - 1)
        self._count_time(index)
        self._save(index, None, None)

    def _name(self, index: int) -> str:
        return "all tasks together" if self.method.joint else self.tasks[index].name

    def _count_time(self, index: int) -> None:
        now = time.perf_counter()
        self.progress.seconds[index] += now - self._clock
        self._clock = now

    def _save(self, index: int, step: int | None, optimizer_state: dict[str, Any] | None) -> None:
        state, optimizer_state = whole_state(self.method.state_dict()), whole_state(optimizer_state)
        keep, rows = self.config.checkpoint.keep, asdict(self.rows)
        self.directory.save(index, step, state, optimizer_state, self.progress, keep=keep, rows=rows)

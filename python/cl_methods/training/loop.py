"""The training loop: hooks of a method around the optimiser steps of one stage, or around one pass in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.methods.base import Batch, Method
from cl_methods.seeding import seed_everything, step_seed
from cl_methods.training.gradients import average_gradients, check_same_graph
from cl_methods.training.schedule import warmup_cosine

_CHECK_EVERY = 16


class NonFiniteLossError(RuntimeError):
    """A loss or a weight became infinite or NaN. The message names the task, the step and every term.

    Attributes:
        task: its name.
        step: 0-based step of the task.
        terms: the loss terms of that step as text, by name; empty where every loss was finite.
    """

    def __init__(self, message: str, *, task: str, step: int, terms: dict[str, str]) -> None:
        super().__init__(message)
        self.task, self.step, self.terms = task, step, terms


class LossLog:
    """Loss terms of the steps of one task, kept on the device so that looking at them is the only synchronisation."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._unchecked: list[tuple[int, dict[str, Tensor]]] = []
        self._latest: dict[str, Tensor] = {}

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """Note the scalar terms of one step; checks at once on a CPU, every 16 steps elsewhere."""
        self._latest = {name: value.detach() for name, value in terms.items()}
        self._unchecked.append((step, self._latest))
        if terms["loss"].device.type == "cpu" or len(self._unchecked) >= _CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Wait for the device and look at every loss since the last check.

        Raises:
            NonFiniteLossError: one of them is infinite or NaN.
        """
        if not self._unchecked:
            return
        finite = torch.isfinite(torch.stack([terms["loss"].float() for _, terms in self._unchecked])).tolist()
        if not all(finite):
            step, terms = self._unchecked[finite.index(False)]
            found = {name: f"{value.item():g}" for name, value in terms.items()}
            listed = ", ".join(f"{name} = {value}" for name, value in found.items())
            raise NonFiniteLossError(
                f"loss is not finite at step {step} of task {self.task}: {listed}. "
                "Lower the learning rate or lengthen the warm-up; the terms that are not finite say where to look.",
                task=self.task,
                step=step,
                terms=found,
            )
        self._unchecked.clear()

    def values(self) -> dict[str, float]:
        """Terms of the latest step as numbers; raises as :meth:`check` does."""
        self.check()
        return {name: float(value) for name, value in self._latest.items()}


@dataclass(frozen=True)
class StepReport:
    """What the loop tells its caller after each optimiser step, or after each batch of a method in closed form.

    Attributes:
        step: 0-based step that has just been done.
        lr: its learning rate; 0 in closed form.
        samples: images of the task in its batch.
        log: loss terms; ``log.values()`` reads them, waits for the device and raises if a loss was not finite. Empty in
            closed form.
        optimizer: the optimiser, for checkpoints; None in closed form.
    """

    step: int
    lr: float
    samples: int
    log: LossLog
    optimizer: torch.optim.Optimizer | None


def train_on_batches(
    method: Method,
    batches: Iterable[Batch],
    *,
    iterations: int,
    warmup: int,
    lr: float,
    seed: int,
    task_index: int,
    start_step: int = 0,
    first_step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    task_name: str | None = None,
) -> torch.optim.Optimizer:
    """Do optimiser steps ``start_step … first_step + iterations`` of one stage on the given batches.

    Each step: seed the global generators from (seed, task, step), set the learning rate of
    :func:`~cl_methods.training.schedule.warmup_cosine`, ``loss``, backward, ``before_step``, optimiser, ``after_step``.
    ``before_task``, ``before_stage`` and ``after_task`` are the caller's. Where several processes compute together, gradients are
    averaged between backward and ``before_step`` (:mod:`cl_methods.ranks`).

    Args:
        method: prepared with ``before_task``.
        batches: batches of steps ``start_step``, ``start_step + 1``, …; may be longer than needed.
        iterations, warmup, lr: the schedule; a parameter group with a key ``lr_scale`` has its rate multiplied by it.
        seed, task_index: with the step, all that random numbers depend on.
        start_step: first step to do, counted within the task; larger than ``first_step`` when resuming.
        first_step: the stage's first step within the task.
        optimizer: to continue with; ``method.optimizer()`` when None.
        on_step: called after each step.
        task_name: for messages; the task's number when None.

    Returns:
        The optimiser in its final state.

    Raises:
        NonFiniteLossError: on a CPU at the step itself, elsewhere up to 16 steps later (no step waits for the device).
        ValueError: ``batches`` ends early.
    """
    if optimizer is None:
        optimizer = method.optimizer()
    log = LossLog(task_name if task_name is not None else f"number {task_index}")
    stream = iter(batches)
    for step in range(max(start_step, first_step), first_step + iterations + 1):
        batch = _next_batch(stream, step, first_step + iterations)
        seed_everything(step_seed(seed, task_index, step))
        rate = warmup_cosine(lr, step - first_step, iterations, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.zero_grad(set_to_none=True)
        terms = method.loss(batch)
        log.add(step, terms)
        terms["loss"].backward()
        if ranks.count() > 1:
            if step == max(start_step, first_step):
                check_same_graph(method.trainable())
            average_gradients(method.trainable())
        method.before_step(batch)
        optimizer.step()
        method.after_step(step)
        if on_step is not None:
            on_step(StepReport(step, rate, len(batch.labels), log, optimizer))
    log.check()
    return optimizer


def learn_from_batches(
    method: Method,
    batches: Iterable[Batch],
    *,
    seed: int,
    task_index: int,
    on_step: Callable[[StepReport], None] | None = None,
    task_name: str | None = None,
) -> None:
    """Give every batch of a pass to a method in closed form; the arguments are those of :func:`train_on_batches`."""
    log = LossLog(task_name if task_name is not None else f"number {task_index}")
    for batch in batches:
        seed_everything(step_seed(seed, task_index, batch.step))
        method.learn(batch)
        if on_step is not None:
            on_step(StepReport(batch.step, 0.0, len(batch.labels), log, None))


def _next_batch(stream: Iterator[Batch], step: int, iterations: int) -> Batch:
    batch = next(stream, None)
    if batch is None:
        raise ValueError(f"batches: ended before step {step}; steps up to {iterations} were expected")
    return batch

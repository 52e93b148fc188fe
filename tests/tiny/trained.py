"""Training a method for a few steps of one task after another, whole or interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_methods.components.ddas import DDASConfig
from cl_methods.datasets.task import Task
from cl_methods.methods import Batch, Method
from cl_methods.seeding import seed_everything
from cl_methods.training.loop import train_on_batches

Batches = Callable[..., list[Batch]]
SHORT: dict[str, Any] = {"lr": 1e-3, "iterations": 3, "warmup": 1}

DETECTOR = DDASConfig(
    features="backbone",
    code=8,
    iterations=300,
    generic_iterations=300,
    batch_size=8,
    decay_epochs=99,
    augment=False,
    relative=True,
    threshold=3.0,
)
"""Tells tasks of noise apart after a second of training."""


def train(
    method: Method, batches: Sequence[Batch], start: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """Steps ``start … start + len(batches) - 1`` of a task, the learning rate falling to zero at the last."""
    return train_on_batches(
        method,
        batches,
        iterations=start + len(batches) - 1,
        warmup=1,
        lr=method.config.lr,
        seed=0,
        task_index=0,
        start_step=start,
        optimizer=optimizer,
    )


def learn(method: Method, tasks: Sequence[Task], batches: Batches, steps: int = 4) -> Method:
    """One task after the other, hooks included."""
    for index, task in enumerate(tasks):
        method.before_task(index, task)
        train(method, batches(index, steps))
        seed_everything(index)
        method.after_task(index, task)
    return method


def weights(method: Method) -> dict[str, Tensor]:
    """Copies of the trained weights."""
    return {name: value.detach().clone() for name, value in method.trainable()}


def state(method: Method) -> dict[str, Tensor]:
    """A copy of the method's state, as a checkpoint holds it."""
    return {name: value.detach().clone() for name, value in method.state_dict().items()}


def with_sgd(method: Method, lr: float) -> torch.optim.Optimizer:
    """Plain SGD over what trains: unlike AdamW it does not blow up rounding errors of tiny gradients."""
    return torch.optim.SGD([value for _, value in method.trainable()], lr=lr)


def gone_on(
    method: Method,
    tasks: Sequence[Task],
    between: dict[str, Tensor],
    middle: dict[str, Tensor],
    moments: dict[str, Any],
) -> tuple[Method, torch.optim.Optimizer]:
    """A new instance in the middle of the second task, as a resumed run brings it there, and its optimiser.

    Args:
        method: the instance.
        tasks: the first two.
        between: the state after the first task.
        middle: the state in the second one.
        moments: of the optimiser.
    """
    method.load_state_dict(between)
    method.recall(tasks[:1])
    method.before_task(1, tasks[1])
    method.load_state_dict(middle)
    optimizer = method.optimizer()
    optimizer.load_state_dict(moments)
    return method, optimizer


def check_resuming(build: Callable[[], Method], tasks: Sequence[Task], batches: Batches) -> None:
    """A new instance with the state of step 2 of the second task ends with the same state to the bit."""
    ends = []
    for resumed in (False, True):
        method = learn(build(), tasks[:1], batches)
        between = state(method)
        steps = batches(1, 4)
        method.before_task(1, tasks[1])
        optimizer = train(method, steps[:2])
        if resumed:
            method, optimizer = gone_on(build(), tasks, between, state(method), optimizer.state_dict())
        train(method, steps[2:], 2, optimizer)
        seed_everything(1)
        method.after_task(1, tasks[1])
        ends.append(state(method))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name

"""One training step in one of several processes, as the training loop does it, counted on tensors without data."""

from __future__ import annotations

import torch
from torch import Tensor

import cl_kernels as clk
from cl_methods import ranks
from cl_methods.datasets.task import Task
from cl_methods.forecast.work import Work, WorkCount
from cl_methods.methods.base import Batch, Method
from cl_methods.ranks.simulated import simulated
from cl_methods.training.gradients import average_gradients

_META = torch.device("meta")


def step_work(
    method: Method,
    task: Task,
    size: int,
    number: int,
    optimizer: torch.optim.Optimizer | None,
    processes: int,
    place: int = 0,
    *,
    sharded: bool = False,
) -> tuple[Work, int]:
    """One step, or one batch of a method in closed form, in the last of several processes; and the bytes kept for backward.

    Args:
        method: on the device ``meta``, after ``before_stage``.
        task: that is learnt.
        size: images of the whole batch.
        number: of the step.
        optimizer: of the stage; None for a method in closed form.
        processes: that compute together.
        place: batch of the reference set that the step has.
        sharded: whether each process updates some rows of the weights alone. What it exchanges of them is not in the work.
    """
    model = method.backbone.model
    with simulated(processes) as exchanges:
        with WorkCount() as gathering:
            batch, read = _batch(method, task, size, number, place)
        trained = [value for _, value in method.trainable()]
        shown = [value for value in (batch.images, batch.reference_images) if value is not None]
        counting = WorkCount([*model.parameters(), *model.buffers(), *trained, *shown])
        with counting:
            if optimizer is None:
                method.learn(batch)
            else:
                optimizer.zero_grad(set_to_none=True)
                method.loss(batch)["loss"].backward()
        with WorkCount() as updating:
            if optimizer is not None:
                _update(method, batch, number, optimizer, average=processes > 1 and not sharded)
    updates = updating.work.shared_out(processes) if sharded else updating.work
    computed = Work(counting.calls, exchanges.summed, exchanges.gathered, read)
    return gathering.work + computed + updates, counting.saved


def _update(method: Method, batch: Batch, number: int, optimizer: torch.optim.Optimizer, *, average: bool) -> None:
    if average:
        average_gradients(method.trainable())
    method.before_step(batch)
    optimizer.step()
    with clk.use_backend("reference"):  # averages compare addresses, which tensors without data lack
        method.after_step(number)


def _batch(method: Method, task: Task, size: int, number: int, place: int) -> tuple[Batch, int]:
    """A batch put together from the shares of all processes, and how many images this one reads."""
    shape = method.backbone.eval_transform(torch.zeros(0)).shape
    source = task.train if method.closed_form else method.training_images(task)
    reference = method.reference_source(task) if method.uses_reference else None
    read = 0

    def pixels(count: int) -> Tensor:
        nonlocal read
        own = len(ranks.share(count))
        read += own
        return ranks.gather_rows(torch.empty(own, *shape, device=_META), count)

    images = pixels(size)
    shown = reference_size(method, size)
    batch = Batch(
        images,
        torch.empty(size, dtype=torch.int64, device=_META),
        number,
        None if reference is None else pixels(shown),
        None if reference is None else torch.arange(shown * place, shown * (place + 1)) % len(reference),
        task,
        torch.arange(size) % len(source),
    )
    return batch, read


def reference_size(method: Method, size: int) -> int:
    """Reference images of a step; ``size`` where the method's settings do not say."""
    return getattr(method.config, "reference_batch_size", size)

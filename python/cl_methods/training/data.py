"""Batches as a pure function of (seed, task, step): the same for any number of workers and wherever a run was resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cl_methods import ranks
from cl_methods.datasets.copying import on_device
from cl_methods.datasets.images import DataError, ImageSource, Subset
from cl_methods.datasets.loading import Items, Transform, evaluation_batches, open_cache, read_share
from cl_methods.datasets.task import Task
from cl_methods.methods.base import Batch, Method, Stage
from cl_methods.seeding import derive_seed, seed_host


def stream_indices(count: int, start: int, length: int, *key: int | str) -> Tensor:
    """Positions ``start … start + length - 1`` of an infinite stream of permutations of ``range(count)``.

    Every image comes once per epoch; a batch may span two epochs, so none is ever smaller than the others.

    Args:
        count: number of images, at least 1.
        start, length: which part of the stream.
        key: seed, task and purpose; with the epoch, all that a permutation depends on.

    Returns:
        (length,) int64.
    """
    pieces = []
    while length > 0:
        epoch, offset = divmod(start, count)
        piece = _permutation(count, derive_seed(*key, "epoch", epoch))[offset : offset + length]
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return torch.cat(pieces)


@lru_cache(maxsize=32)
def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class TrainingSteps(Dataset):
    """The data of every optimiser step of one stage of one task; item t is step t of the task.

    Complete, but for pixels where several processes compute together: then those of this process's share of each batch. Which
    images a batch has, and how each is augmented, does not depend on the number of processes.

    Args:
        tasks: the current task; or all of them for joint training, of which step t takes number ``t mod T``.
        reference: unlabelled images, or None.
        images: for each of ``tasks`` where its images and labels come from; its training images when None.
        stage: number of the stage within the task; later stages draw other orders than the first.
        first_step: the stage's first step within the task.
        task_index, seed: with the step, all that order and augmentation depend on.
        batch_size, reference_batch_size: images per step.
        train_transform, eval_transform: for the task's images and for the reference images.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        reference: ImageSource | None,
        *,
        task_index: int,
        seed: int,
        batch_size: int,
        reference_batch_size: int,
        train_transform: Transform,
        eval_transform: Transform,
        images: Sequence[ImageSource] | None = None,
        stage: int = 0,
        first_step: int = 0,
    ) -> None:
        self.tasks, self.reference = tuple(tasks), reference
        self.sources = tuple(images) if images is not None else tuple(task.train for task in tasks)
        self.order = ("order",) if stage == 0 else ("order of stage", stage)
        self.first_step = first_step
        self.task_index, self.seed = task_index, seed
        self.batch_size, self.reference_batch_size = batch_size, reference_batch_size
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.share = ranks.share(batch_size)  # decided here: worker processes know nothing of the others
        self.reference_share = ranks.share(reference_batch_size)

    @classmethod
    def of_stage(
        cls,
        method: Method,
        tasks: Sequence[Task],
        index: int,
        stage: Stage,
        *,
        seed: int,
        number: int = 0,
        first_step: int = 0,
        learnt_before: int = 0,
    ) -> TrainingSteps:
        """What ``method`` reads in a stage of task ``tasks[index]``, with the sources, sizes and transforms that it asks for.

        Args:
            method: after ``before_task``.
            tasks: the whole sequence.
            index: of the task that is learnt.
            stage: of that task.
            seed: of the run.
            number: of the stage within the task.
            first_step: of the stage within the task.
            learnt_before: tasks that the method learnt in earlier runs, which its random numbers go on from.
        """
        task, backbone = tasks[index], method.backbone
        return cls(
            tasks if method.joint else [task],
            method.reference_source(task) if method.uses_reference else None,
            task_index=learnt_before + index,
            seed=seed,
            batch_size=stage.batch_size,
            reference_batch_size=getattr(method.config, "reference_batch_size", stage.batch_size),
            train_transform=backbone.train_transform,
            eval_transform=backbone.eval_transform,
            images=None if method.joint else [method.training_images(task)],
            stage=number,
            first_step=first_step,
        )

    def __getitem__(self, step: int) -> dict[str, Tensor] | DataError:
        """Images, labels and reference images of one step, or the error that reading them gave."""
        try:
            return self._read(step)
        except DataError as error:  # as a value, it crosses the process boundary with its message intact
            return error

    def _read(self, step: int) -> dict[str, Tensor]:
        turn, position = divmod(step - self.first_step, len(self.tasks))
        source = self.sources[position]
        if len(source) == 0:
            raise DataError(f"task {self.tasks[position].name} has no training images")
        indices = stream_indices(
            len(source), turn * self.batch_size, self.batch_size, self.seed, *self.order, self.task_index + position
        )
        images = []
        for place in self.share or range(1):
            seed_host(derive_seed(self.seed, "augmentation", self.task_index, step, place))
            images.append(self.train_transform(source.image(int(indices[place]))))
        data = {"images": torch.stack(images)[: len(self.share)], "labels": source.labels[indices], "indices": indices}
        data["step"] = torch.tensor(step)
        if self.reference is not None:
            size = self.reference_batch_size
            chosen = stream_indices(len(self.reference), step * size, size, self.seed, "reference", self.task_index)
            data["reference_images"] = read_share(self.reference, chosen, self.eval_transform, self.reference_share)
            data["reference_indices"] = chosen
        return data


def training_batches(
    steps: TrainingSteps, *, start_step: int, iterations: int, device: torch.device, workers: int = 0
) -> Iterator[Batch]:
    """Batches of steps ``start_step … iterations``, loaded by one set of workers that lives as long as the task.

    Args:
        steps: what each step reads.
        start_step, iterations: first and last step, counted within the task.
        device: where the batches go.
        workers: processes that read ahead; 0 reads in this one. The number changes nothing but the speed.

    Raises:
        DataError: an image cannot be read.
    """
    if steps.reference is not None:
        open_cache(steps.reference, steps.eval_transform)
    items = Items(steps, device, workers).read(range(start_step, iterations + 1))
    for data in on_device(items, device):
        step = int(data["step"])
        task = steps.tasks[(step - steps.first_step) % len(steps.tasks)]
        images = {
            name: ranks.gather_rows(data[name], size)
            for name, size in (("images", steps.batch_size), ("reference_images", steps.reference_batch_size))
            if name in data
        }
        yield Batch(
            **images,
            labels=data["labels"],
            step=step,
            reference_indices=data.get("reference_indices"),
            task=task,
            indices=data["indices"],
        )


def one_pass(
    task: Task,
    *,
    task_index: int,
    seed: int,
    batch_size: int,
    transform: Transform,
    start_step: int = 0,
    device: torch.device,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every training image of ``task`` once, shuffled; the last batch may be smaller.

    Args:
        task: whose images are read.
        task_index, seed: all that the order depends on.
        batch_size: images per batch.
        transform: of the images.
        start_step: first batch, for resuming; batches do not depend on it.
        device, workers: see :func:`training_batches`.

    Raises:
        DataError: the task has no training images, or one cannot be read.
    """
    count = len(task.train)
    if count == 0:
        raise DataError(f"task {task.name} has no training images")
    order = stream_indices(count, 0, count, seed, "order", task_index)
    rest = Subset(task.train, order[start_step * batch_size :])
    batches = evaluation_batches(rest, transform, batch_size=batch_size, device=device, workers=workers)
    for step, (images, labels) in enumerate(batches, start_step):
        indices = order[step * batch_size : (step + 1) * batch_size]
        yield Batch(images, labels, step, task=task, indices=indices)

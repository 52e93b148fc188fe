"""How accuracies are measured: label spaces, split, and which images of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from cl_methods.components.uncertainty import Uncertainty
from cl_methods.datasets.images import ImageSource, Subset
from cl_methods.datasets.task import Task

LabelSpace = Literal["task", "seen", "all"]

USUAL_BATCH = 128
"""Images that are scored together where nothing says how many the memory holds; the number of the public code."""


@dataclass
class EvaluationOptions:
    """How accuracies are measured.

    Attributes:
        label_space: which classes compete: those of the evaluated task (MTIL), of it and all tasks learnt so far, or of
            all tasks. Several are measured from one pass over the images; the first is that of the reported accuracies.
        split: images that are evaluated; tune on `validation` only.
        batch_size: images that are scored together; `auto` takes as many as are fastest and fit into the memory that is left,
            see docs/evaluation.md.
        limit: evaluate at most so many images of each task, evenly spread over its classes and always the same ones.
        feature_memory: GiB of host memory for features of frozen image encoders, which are then computed once per run.
        novelty: after each task but the last, also measure how well these uncertainties tell images of learnt tasks from those of
            tasks to come: `energy`, `entropy`, `confidence` or, for methods that draw their scores, `variance`.
        only: measure all tasks once and learn nothing, such as what `--weights` brings.
    """

    label_space: LabelSpace | tuple[LabelSpace, ...] = "task"
    split: Literal["test", "validation"] = "test"
    batch_size: int | Literal["auto"] = "auto"
    limit: int | None = None
    feature_memory: float = 4.0
    novelty: tuple[Uncertainty, ...] = ()
    only: bool = False

    def __post_init__(self) -> None:
        spaces = self.label_spaces
        if not spaces or len(set(spaces)) < len(spaces) or not set(spaces) <= set(get_args(LabelSpace)):
            raise ValueError(
                f"label_space: expected different ones of task, seen and all, got {' '.join(spaces) or '()'}"
            )
        if len(spaces) == 1:
            self.label_space = spaces[0]
        known = get_args(Uncertainty)
        if len(set(self.novelty)) < len(self.novelty) or not set(self.novelty) <= set(known):
            raise ValueError(
                f"novelty: expected different ones of {', '.join(known)}, got {' '.join(map(str, self.novelty))}"
            )
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise ValueError(f"batch_size: expected a number of images >= 1, or auto, got {self.batch_size!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected a number of images >= 1, got {self.limit}")
        if not self.feature_memory >= 0:
            raise ValueError(f"feature_memory: expected GiB >= 0, got {self.feature_memory}")

    @property
    def images_together(self) -> int:
        """:attr:`batch_size`; the usual one where `auto` has not been decided."""
        return USUAL_BATCH if self.batch_size == "auto" else self.batch_size

    @property
    def label_spaces(self) -> tuple[LabelSpace, ...]:
        """One or several."""
        return (self.label_space,) if isinstance(self.label_space, str) else tuple(self.label_space)


def competing_tasks(tasks: Sequence[Task], index: int, learnt: int, label_space: LabelSpace) -> list[Task]:
    """Tasks whose classes compete when task ``index`` is evaluated after the first ``learnt`` tasks were learnt.

    The evaluated task is always among them.

    Raises:
        ValueError: unknown ``label_space``.
    """
    if label_space == "task":
        return [tasks[index]]
    if label_space == "seen":
        return [task for place, task in enumerate(tasks) if place < learnt or place == index]
    if label_space == "all":
        return list(tasks)
    raise ValueError(f"label_space: expected task, seen or all, got {label_space!r}")


def guessing(tasks: Sequence[Task], index: int, label_space: LabelSpace) -> float:
    """Accuracy of guessing on task ``index`` in percent, among the classes that compete after the last task."""
    competing = competing_tasks(tasks, index, len(tasks), label_space)
    return 100.0 / len({name for task in competing for name in task.class_names})


def evaluated_images(task: Task, options: EvaluationOptions) -> ImageSource:
    """The images of the configured split on which ``task`` is evaluated: all, or ``limit`` of them."""
    source = task.test if options.split == "test" else task.validation
    if options.limit is None or len(source) <= options.limit:
        return source
    return Subset(source, spread_over_classes(source, options.limit))


def spread_over_classes(source: ImageSource, count: int) -> torch.Tensor:
    """Indices (count,) int64 of images at equal distances in the list ordered by class; ascending, without random numbers.

    A class with the share p of the images has between ``⌊p count⌋`` and ``⌈p count⌉`` of the chosen ones.
    """
    by_class = source.labels.argsort(stable=True)
    places = torch.div((2 * torch.arange(count) + 1) * len(source), 2 * count, rounding_mode="floor")
    return by_class[places].sort().values

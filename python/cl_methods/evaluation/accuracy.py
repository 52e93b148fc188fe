"""Accuracy and calibration of a method on a task, within a chosen label space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_methods.datasets.loading import evaluation_batches
from cl_methods.datasets.task import Task
from cl_methods.evaluation.uncertainty import calibration_error, reliability
from cl_methods.methods.base import Method

LabelSpace = Literal["task", "seen", "all"]


@dataclass
class EvaluationOptions:
    """How accuracies are measured.

    Attributes:
        label_space: which classes compete: those of the evaluated task (MTIL), of it and all tasks learnt so far, or of
            all tasks. The last two encode every image once per competing task.
        split: images that are evaluated; tune on `validation` only.
        batch_size: images per batch.
    """

    label_space: LabelSpace = "task"
    split: Literal["test", "validation"] = "test"
    batch_size: int = 128


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


@dataclass(frozen=True)
class Measured:
    """What was measured on one task.

    Attributes:
        accuracy: percentage of images whose highest score belongs to a class with the right name.
        calibration_error: expected calibration error of the soft-max of the scores, in percent.
        reliability: images, right ones and confidences in each of its bins; see
            :func:`~cl_methods.evaluation.uncertainty.reliability`.
    """

    accuracy: float
    calibration_error: float
    reliability: dict[str, list[Any]]


@torch.no_grad()
def measure(
    method: Method, task: Task, candidates: Sequence[Task], options: EvaluationOptions, workers: int = 0
) -> Measured:
    """Classify every image of a task among the classes of the candidates.

    Classes of the same name in several tasks count as one class, whose probability is the sum of theirs.

    Args:
        method: after ``before_evaluation``.
        task: whose images are classified.
        candidates: tasks whose classes compete, ``task`` among them.
        options: split and batch size.
        workers: data-loading processes.

    Raises:
        ValueError: the split is empty, or the scores have the wrong shape or are NaN.
    """
    source = task.test if options.split == "test" else task.validation
    if len(source) == 0:
        raise ValueError(f"evaluation.split: task {task.name} has no {options.split} images")
    names = [name for candidate in candidates for name in candidate.class_names]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    device = method.backbone.device
    predicted_class = torch.tensor([numbers[name] for name in names], device=device)
    true_class = torch.tensor([numbers[name] for name in task.class_names], device=device)
    confidence, correct = [], []
    invalid = torch.zeros((), dtype=torch.bool, device=device)
    for images, labels in evaluation_batches(
        source, method.backbone.eval_transform, batch_size=options.batch_size, device=device, workers=workers
    ):
        scores = torch.cat([_scores(method, images, candidate) for candidate in candidates], dim=1)
        invalid |= scores.isnan().any()
        predicted = predicted_class[scores.argmax(dim=1)]
        correct.append(predicted == true_class[labels])
        classes = scores.new_zeros(len(scores), len(numbers), dtype=torch.float64)
        classes.index_add_(1, predicted_class, scores.double().softmax(dim=1))
        confidence.append(classes.gather(1, predicted[:, None]).squeeze(1))
    if invalid:
        raise ValueError(f"logits of {method.name} on {task.name}: some are NaN; the weights have diverged")
    right, sure = torch.cat(correct), torch.cat(confidence)
    accuracy = 100.0 * int(right.sum()) / len(source)
    return Measured(accuracy, 100.0 * calibration_error(sure, right), reliability(sure, right))


def measure_row(
    method: Method,
    tasks: Sequence[Task],
    learnt: int,
    options: EvaluationOptions,
    workers: int = 0,
    on_task: Callable[[int, float], None] | None = None,
) -> list[Measured]:
    """Every task with the method as it is: one row of the matrix.

    Args:
        method: the method after ``learnt`` tasks.
        tasks: the whole sequence.
        learnt: number of tasks learnt; 0 for the zero-shot row.
        options, workers: see :func:`measure`.
        on_task: called with the task's position and its accuracy.
    """
    method.before_evaluation()
    row = []
    for index, task in enumerate(tasks):
        candidates = competing_tasks(tasks, index, learnt, options.label_space)
        row.append(measure(method, task, candidates, options, workers))
        if on_task is not None:
            on_task(index, row[-1].accuracy)
    return row


def _scores(method: Method, images: Tensor, task: Task) -> Tensor:
    scores = method.logits(images, task)
    if scores.shape != (len(images), len(task.class_names)):
        expected = (len(images), len(task.class_names))
        raise ValueError(f"logits of {method.name} on {task.name}: expected {expected}, got {tuple(scores.shape)}")
    return scores

"""Counting, in one label space, which images of a task got the right class and how sure the method was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.datasets.task import Task
from cl_methods.evaluation.uncertainty import calibration_error, reliability


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


@dataclass
class Tally:
    """What is counted in one label space, batch by batch; nothing waits for the device.

    Attributes:
        predicted_class: (columns,) number of the class that each score belongs to; equal names have equal numbers.
        true_class: (C,) number of each class of the evaluated task.
        invalid: scalar, whether a score was NaN.
        correct, confidence: for each batch (B,).
    """

    predicted_class: Tensor
    true_class: Tensor
    invalid: Tensor
    correct: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task, candidates: Sequence[Task], device: torch.device) -> Tally:
        """For images of ``task`` scored among the classes of ``candidates``, in this order."""
        names = [name for candidate in candidates for name in candidate.class_names]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        predicted = torch.tensor([numbers[name] for name in names], device=device)
        true = torch.tensor([numbers[name] for name in task.class_names], device=device)
        return cls(predicted, true, torch.zeros((), dtype=torch.bool, device=device))

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: ``scores`` (B, columns) among the classes that compete, ``labels`` (B,) int64 among the task's own."""
        self.invalid |= scores.isnan().any()
        predicted = self.predicted_class[scores.argmax(dim=1)]
        self.correct.append(predicted == self.true_class[labels])
        classes = scores.new_zeros(len(scores), len(self.predicted_class), dtype=torch.float64)
        classes.index_add_(1, self.predicted_class, scores.double().softmax(dim=1))
        self.confidence.append(classes.gather(1, predicted[:, None]).squeeze(1))

    def collect(self, batches: int, start: int) -> None:
        """Take in what the other processes counted in their batches, as they were dealt; all batches in order then."""
        if ranks.count() == 1:
            return
        device = self.invalid.device
        own = [(right.cpu(), sure.cpu()) for right, sure in zip(self.correct, self.confidence, strict=True)]
        pairs = ranks.gather_batches(own, batches, start)
        self.correct, self.confidence = ([one.to(device) for one in values] for values in zip(*pairs, strict=True))
        self.invalid = torch.tensor(ranks.anyone(bool(self.invalid)), device=device)

    def measured(self) -> Measured:
        """Of all batches so far."""
        right, sure = torch.cat(self.correct), torch.cat(self.confidence)
        accuracy = 100.0 * int(right.sum()) / len(right)
        return Measured(accuracy, 100.0 * calibration_error(sure, right), reliability(sure, right))

"""Joint training on all tasks together: the upper bound, not a continual method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cl_methods.datasets.task import Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune


@dataclass(frozen=True)
class JointConfig(TrainConfig):
    """Settings of :class:`TrainConfig`; ``iterations`` counts all tasks together."""

    iterations: int = 11000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None:
            raise ValueError(f"epochs: joint training counts iterations over all tasks together, got {self.epochs}")


class Joint(FineTune):
    """Fine-tuning on the data of every task at once, each step one task's batch and classes: ``L = CE(s f(x) g(c_t)ᵀ, y)``.

    The bound for methods that see one task at a time; itself not a continual method.
    """

    name: ClassVar[str] = "joint"
    facts: ClassVar[Facts] = Facts(
        source="upper bound",
        trains="all of CLIP but the logit scale",
        carries="everything: not continual",
    )
    joint: ClassVar[bool] = True

    Config: ClassVar[type[TrainConfig]] = JointConfig
    _first: Task | None = None

    def before_task(self, index: int, task: Task) -> None:
        """Start without texts; each task's are tokenised when its first batch comes."""
        super().before_task(index, task)
        self._first = task
        self._task_texts: dict[str, Tensor] = {}

    def learning_rate(self, task: Task) -> float:
        """One rate for all tasks."""
        return self.config.lr

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss"}``: the cross-entropy of the batch over the classes of its own task.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self._first is None:
            raise RuntimeError("joint: call before_task before the first step")
        task = batch.task if batch.task is not None else self._first
        if task.name not in self._task_texts:
            self._task_texts[task.name] = self.training_texts(task)
        features = self.backbone.encode_images(batch.images)
        return {"loss": self.cross_entropy(features, batch.labels, self._task_texts[task.name])}

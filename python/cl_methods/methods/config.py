"""Optimisation settings that every trained method shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from cl_methods.checks import check_at_least, check_finite


@dataclass(frozen=True)
class TrainConfig:
    """How one task is optimised: AdamW, linear warm-up, half a cosine (``training.schedule.warmup_cosine``).

    Attributes:
        lr: peak learning rate.
        task_lr: peak learning rate of single tasks by name; overrides ``lr``.
        iterations: T; a task has T + 1 optimiser steps, the last at learning rate zero.
        epochs: passes over the task's images that T is counted from; None: ``iterations`` says it.
        batch_size: images of the task per step.
        warmup: warm-up steps.
        label_smoothing: of the cross-entropy, 0 to 1.
        weight_decay: decoupled, per unit of learning rate.
        betas: decay rates of AdamW's first and second moment.
    """

    lr: float = 1e-5
    task_lr: dict[str, float] = field(default_factory=dict)
    iterations: int = 1000
    epochs: int | None = None
    batch_size: int = 64
    warmup: int = 100
    label_smoothing: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("lr", "iterations", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name, rate in self.task_lr.items():
            if not rate > 0:
                raise ValueError(f"task_lr: expected a number > 0 for {name!r}, got {rate}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs: expected a number of passes >= 1, got {self.epochs}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected a number of steps >= 0, got {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= value < 1, got {self.label_smoothing}")
        check_at_least(self, 0, "weight_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")

    def task_iterations(self, images: int) -> int:
        """T for a task with so many training images."""
        return self.iterations if self.epochs is None else self.epochs * -(-images // self.batch_size)

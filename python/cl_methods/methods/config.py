"""Optimisation settings that every trained method shares, with published values per scenario."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class TrainConfig:
    """How one task is optimised: AdamW, linear warm-up, half a cosine (``training.schedule.warmup_cosine``).

    Attributes:
        lr: peak learning rate.
        task_lr: peak learning rate of single tasks by name; overrides ``lr``.
        iterations: T; a task has T + 1 optimiser steps, the last at learning rate zero.
        batch_size: images of the task per step.
        warmup: warm-up steps.
        label_smoothing: of the cross-entropy, 0 to 1.
        weight_decay: decoupled, per unit of learning rate.
        betas: decay rates of AdamW's first and second moment.
    """

    lr: float = 1e-5
    task_lr: dict[str, float] = field(default_factory=dict)
    iterations: int = 1000
    batch_size: int = 64
    warmup: int = 100
    label_smoothing: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    scenario_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def for_scenario(cls, name: str) -> Self:
        """The values for the scenario ``name`` (``"mtil"``: published; ``"mini"``: tuned on its validation split)."""
        return cls(**cls.scenario_defaults.get(name, {}))

    def __post_init__(self) -> None:
        for name in ("lr", "iterations", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name, rate in self.task_lr.items():
            if not rate > 0:
                raise ValueError(f"task_lr: expected a number > 0 for {name!r}, got {rate}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected a number of steps >= 0, got {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= value < 1, got {self.label_smoothing}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")


def check_fraction(config: Any, *names: str) -> None:
    """Check that the named fields of ``config`` lie in [0, 1].

    Raises:
        ValueError: one does not.
    """
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: expected 0 <= value <= 1, got {getattr(config, name)}")


def check_field(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Check that the field ``name`` of ``config`` has one of the allowed values.

    Raises:
        ValueError: it has another.
    """
    assert name in {entry.name for entry in fields(config)}
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(config, name)!r}")


FULL_TUNING_TASK_LR = {"Aircraft": 5e-5, "MNIST": 5e-5}
"""Rates of the published full fine-tuning runs on MTIL that differ from 1e-5 (both orders)."""

ADAPTER_TASK_LR = {
    "Aircraft": 5e-3,
    "Caltech101": 1e-3,
    "CIFAR100": 5e-3,
    "DTD": 1e-3,
    "EuroSAT": 1e-4,
    "Flowers102": 1e-3,
    "Food101": 1e-3,
    "MNIST": 1e-4,
    "OxfordPet": 1e-3,
    "StanfordCars": 1e-3,
    "SUN397": 1e-3,
}
"""Rates of the published MoE-Adapters run on full-shot MTIL, order I (none was published for order II)."""

ADAPTER_TASK_LR_FEW_SHOT = {
    "Aircraft": 8e-3,
    "Caltech101": 5e-4,
    "CIFAR100": 2e-4,
    "DTD": 5e-3,
    "EuroSAT": 1e-3,
    "Flowers102": 1e-3,
    "Food101": 1e-2,
    "MNIST": 1e-4,
    "OxfordPet": 1e-2,
    "StanfordCars": 1e-2,
    "SUN397": 1e-2,
}
"""The same for 5-shot MTIL, which runs 500 iterations."""

"""How many parameters every method trains over a model, counted from the methods themselves; no weights are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cl_methods.backbone import Backbone
from cl_methods.backbone.open_clip_loading import untrained_open_clip
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Method


@dataclass(frozen=True)
class ParameterCount:
    """One method's count.

    Attributes:
        method: its name.
        trainable: parameters that an optimiser changes while the first task is learnt.
        model: parameters of the model.
    """

    method: str
    trainable: int
    model: int


def trainable_parameters(model: str, classes: int) -> Iterator[ParameterCount]:
    """What each method trains with its settings for MTIL, when its first task has so many classes.

    Args:
        model: open_clip name; its weights are random.
        classes: of the task.

    Raises:
        ValueError: the model is unknown, or ``classes`` < 1.
    """
    if classes < 1:
        raise ValueError(f"classes: expected a number >= 1, got {classes}")
    network, *parts = untrained_open_clip(model)
    total = sum(value.numel() for value in network.parameters())
    for name, method_type in METHODS.items():
        backbone = Backbone(copy.deepcopy(network), *parts, name=model)
        method = method_type(backbone, _without_files(method_type.default_config("mtil")), _reference())
        yield ParameterCount(name, _count(method, classes), total)


def _count(method: Method, classes: int) -> int:
    if not method.trains or method.closed_form:
        return 0
    names = tuple(f"class {number}" for number in range(classes))
    images = _images(classes, classes)
    task = Task("first", names, ("a photo of {}.",), images, images, images)
    method.before_task(0, task)
    method.stage = method.stages(task)[0]
    method.before_stage(method.stage)
    return sum(value.numel() for _, value in method.trainable())


def _without_files(settings: Any) -> Any:
    """A task detector does not count as trainable; here it must not need weights on disk."""
    if getattr(settings, "detection", None) != "ddas":
        return settings
    return replace(settings, ddas=replace(settings.ddas, features="backbone", augment=False))


def _images(count: int, classes: int) -> TensorImages:
    return TensorImages(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.arange(count) % classes)


def _reference() -> Reference:
    return Reference(_images(2, 1), ("a caption", "another caption"))

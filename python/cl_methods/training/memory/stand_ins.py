"""Blank tasks with the sizes of real ones, on which a method is rehearsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Task
from cl_methods.training.planning.without_data import BlankImages

IMAGES = 8
"""Images of a task that are rehearsed; what a method keeps of every image is counted for these alone."""


def stand_ins_for(tasks: Sequence[Task], *, joint: bool) -> list[Task]:
    """The last task to be rehearsed, the one with most classes, and before it all the others as one."""
    largest = max(tasks, key=lambda task: len(task.class_names))
    others = [task for task in tasks if task is not largest]
    found = [largest]
    if others and not joint:
        names = tuple(name for task in others for name in task.class_names)
        found = [dataclasses.replace(others[0], name="earlier tasks", class_names=names), largest]
    return [dataclasses.replace(task, **_blank_images(task)) for task in found]


def _blank_images(task: Task) -> dict[str, Any]:
    classes = len(task.class_names)
    return {
        name: BlankImages(min(IMAGES, len(getattr(task, name))), classes) for name in ("train", "validation", "test")
    }


def blank_transform(backbone: Backbone) -> Callable[[Any], Tensor]:
    """A transform that gives a black image of the model's size."""
    size = backbone.model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return lambda _: torch.zeros(3, height, width)

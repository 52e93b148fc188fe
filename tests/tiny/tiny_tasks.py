"""Two small tasks, a reference set and batches of them, over the tiny CLIP of ``tiny_clip``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_clip import build_backbone, noise_images, transform

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import Batch


@pytest.fixture
def backbone() -> Backbone:
    return build_backbone()


@pytest.fixture
def tasks() -> list[Task]:
    """Two tasks that differ in brightness, with 3 and 2 classes."""
    made = []
    for index, names in enumerate((("ant", "bee", "cat"), ("dog", "eel"))):
        images = [noise_images(24, 10 * index + part, len(names), 70 + 110 * index) for part in range(3)]
        made.append(Task(f"task{index}", names, ("a photo of {}", "{} again"), *images))
    return made


@pytest.fixture
def reference() -> Reference:
    return Reference(noise_images(20, 99, 1, 128), ("one thing", "two", "three things", "a fourth"))


@pytest.fixture
def batches(tasks: list[Task], reference: Reference) -> Callable[..., list[Batch]]:
    """``batches(task, steps)``: batches of 6 images and 4 reference images, which repeat after 3 steps."""

    def make(index: int = 0, steps: int = 4) -> list[Batch]:
        source, found = tasks[index].train, []
        for step in range(steps):
            rows = torch.arange(6 * step, 6 * step + 6) % len(source)
            others = torch.arange(4 * (step % 3), 4 * (step % 3) + 4)
            images = torch.stack([transform(source.image(row)) for row in rows.tolist()])
            shown = torch.stack([transform(reference.images.image(row)) for row in others.tolist()])
            found.append(Batch(images, source.labels[rows], step, shown, others, tasks[index]))
        return found

    return make

"""Scenarios whose images need not be there: tasks of the published sizes with their class names and prompts."""

from __future__ import annotations

import dataclasses

from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.task import Reference, Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.mtil import chosen_datasets
from cl_methods.training.building import select_scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.without_data import BlankImages

CAPTIONS = 15_840
"""Of the Conceptual Captions validation set, which the published ZSCL distils against."""

REFERENCE_IMAGES = 1_281_167
"""Of the ImageNet training set, which it distils on."""

_CAPTION = "a photo of a small dog that runs over green grass"


def scenario_without_files(
    config: RunConfig, captions: int = CAPTIONS, reference_images: int = REFERENCE_IMAGES
) -> Scenario:
    """The configured scenario; for ``mtil`` without ``data.root`` one of the published sizes, with reference data of the given.

    Args:
        config: names the scenario, the order, and how the data is split.
        captions: reference texts, of 12 tokens each.
        reference_images: unlabelled images.

    Raises:
        ValueError: a number is not positive.
        DataError: the order is unknown, or data that the scenario reads is missing.
    """
    for name, value in (("captions", captions), ("reference_images", reference_images)):
        if value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    if config.scenario != "mtil" or config.data.root is not None:
        return select_scenario(config)
    tasks = tuple(_task(name, config) for name in chosen_datasets(config.order)[: config.limit_tasks])
    reference = Reference(BlankImages(reference_images, 1), (_CAPTION,) * captions)
    return Scenario("mtil", config.order, tasks, reference, {"data": "published sizes, no files"})


def _task(name: str, config: RunConfig) -> Task:
    spec, data = DATASETS[name], config.data
    texts, (train, validation, test) = spec.classes(data.split), spec.sizes[data.split]
    assert train is not None  # every dataset of MTIL has published sizes
    if data.shots is not None:
        train = min(train, data.shots * len(texts))
    blank = [BlankImages(count, len(texts)) for count in (train, validation, test)]
    return Task(name, texts.names, texts.templates, *blank)


def shortened(task: Task, images: int) -> Task:
    """The task with so many training images, and two of every class to evaluate on, of which nothing but labels exists."""
    classes = len(task.class_names)
    few = BlankImages(2 * classes, classes)
    return dataclasses.replace(task, train=BlankImages(images, classes), validation=few, test=few)

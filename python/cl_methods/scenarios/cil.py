"""Scenario ``cil``: the classes of one dataset, learnt a few at a time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from cl_methods.datasets.find import find_dataset
from cl_methods.datasets.images import DataError, ImageSource, Subset
from cl_methods.datasets.specification import DATASETS, meant
from cl_methods.datasets.task import Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.class_order import class_order, protocol
from cl_methods.scenarios.mtil import split_options

if TYPE_CHECKING:
    from cl_methods.scenarios import ScenarioOptions

DEFAULT_STEPS = 10


class ClassSubset(Subset):
    """The images of some classes of another source, numbered anew.

    Args:
        source: labelled with the classes of the whole dataset.
        classes: labels there, in the order of the labels here.
        fingerprint: of ``source``, which every task of a sequence would compute again.
    """

    def __init__(self, source: ImageSource, classes: tuple[int, ...], fingerprint: str) -> None:
        numbers = torch.full((max(int(source.labels.max()) if len(source) else 0, *classes) + 1,), -1)
        numbers[torch.tensor(classes)] = torch.arange(len(classes))
        labels = numbers[source.labels]
        super().__init__(source, torch.nonzero(labels >= 0).flatten())
        self.labels: Tensor = labels[self.indices]
        self._source_fingerprint = fingerprint

    @override
    def fingerprint(self) -> str:
        """sha256 over the whole source, which images of it these are, and their new labels."""
        parts = (self._source_fingerprint.encode(), self.indices.numpy().tobytes(), self.labels.numpy().tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def load_scenario(options: ScenarioOptions, order: str = "I") -> Scenario:
    """One dataset below ``options.root`` as a sequence of tasks with some of its classes each.

    Args:
        options: where the data is, which dataset, steps and base classes; family of splits, shots, reference data.
        order: of the classes; see :func:`~cl_methods.scenarios.class_order.class_order`.

    Raises:
        DataError: the dataset is unknown, missing or damaged, the steps do not divide its classes, or the order does not fit it.
    """
    name = options.dataset
    if name is None:
        raise DataError(f"data.dataset: scenario cil needs a dataset to split, one of {', '.join(DATASETS)}")
    if name not in DATASETS:
        close = meant(name)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(DATASETS)}"
        raise DataError(f"data.dataset: there is no dataset {name!r}; {hint}")
    if options.root is None:
        raise DataError("data.root: scenario cil needs the folder that holds the dataset")
    spec, published = DATASETS[name], protocol(name)
    classes = spec.classes(options.split)
    base = options.base_classes
    if base is None:
        base = published.base_classes if published is not None else 0
    sizes = task_sizes(name, len(classes), DEFAULT_STEPS if options.steps is None else options.steps, base)
    ordered = class_order(order, name, len(classes))
    found = find_dataset(spec, options.root, split_options(options))
    names, templates = found.task.class_names, found.task.templates
    if published is not None and options.split == "zscl":
        templates = (published.template,)
        names = classes.keys if published.names == "files" else names
    splits = (found.task.train, found.task.validation, found.task.test)
    prints = [split.fingerprint() for split in splits]
    tasks, start = [], 0
    for size in sizes:
        chosen = ordered[start : start + size]
        parts = [ClassSubset(split, chosen, told) for split, told in zip(splits, prints, strict=True)]
        label = f"{start + 1}-{start + size}" if size > 1 else f"{start + 1}"
        tasks.append(Task(label, tuple(names[number] for number in chosen), templates, *parts))
        start += size
    notes = {name: f"{found.layout}, split {found.family}, fingerprint {found.fingerprint()}"}
    return Scenario(name="cil", order=order, tasks=tuple(tasks), notes=notes)


def task_sizes(dataset: str, classes: int, steps: int, base: int) -> tuple[int, ...]:
    """Classes per task: ``base`` classes first, where that is not 0, then ``steps`` tasks with an equal share of the rest.

    Raises:
        DataError: the numbers do not divide the classes evenly.
    """
    if steps < 1:
        raise DataError(f"data.steps: expected a number >= 1, got {steps}")
    if not 0 <= base < classes:
        raise DataError(
            f"data.base_classes: expected 0 to {classes - 1} of the {classes} classes of {dataset}, got {base}"
        )
    rest = classes - base
    if rest % steps:
        fitting = ", ".join(str(number) for number in range(1, rest + 1) if rest % number == 0)
        after = f" after {base} base classes" if base else ""
        raise DataError(
            f"data.steps: {rest} classes of {dataset}{after} cannot be shared evenly among {steps} steps; these can: {fitting}"
        )
    return (*([base] if base else []), *[rest // steps] * steps)

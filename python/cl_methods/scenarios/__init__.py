"""Scenarios: sequences of tasks, by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cl_methods.datasets.cache_folder import CacheFolder
from cl_methods.datasets.image_cache import cached
from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.reference import drawn, read_reference
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.cache import cache_folder

SCENARIOS: dict[str, str] = {
    "mini": "the embedded offline world: seven small tasks, nothing to download",
    "folders": "your own images: every sub-folder of --data.root is a task in the ImageFolder layout",
    "cil": "the classes of one dataset below --data.root a few at a time (`--data.dataset CIFAR100 --data.steps 10`)",
    "mtil": "eleven datasets below --data.root, in the published splits (`clk data check` says what is there)",
    "xtail": "ten of them with 16 shots in CoOp's splits, all their classes competing under one prompt (X-TAIL)",
}


@dataclass
class ScenarioOptions:
    """Where a scenario's data is and how it is split.

    Attributes:
        root: folder that holds the data (scenarios `folders`, `mtil`, `xtail` and `cil`).
        validation_fraction: share of the training images that becomes the validation split where a task brings none; by default a
            tenth for `folders`, and none for `mtil` and `cil`, as in the published runs.
        test_fraction: share of the images that becomes the test split where a task of `folders` brings none.
        split_seed: seed of those splits, and of few-shot draws.
        split: family of published splits, class names and prompts for `mtil` and `cil`: `zscl` (ZSCL, MoE-Adapters) or
            `coop` (CoOp, DIKI; the default of `xtail`).
        shots: training images per class for `mtil`, `cil` and `xtail`; all of them by default, 16 for `xtail`.
        sizes: `any` lets `mtil`, `cil` and `xtail` run on datasets whose splits have other than the published sizes.
        reference_images: images for methods that distil, in place of the scenario's own: a folder, WebDataset shards, or a table
            of files.
        reference_limit: draw so many of the reference images, by split_seed; all by default.
        reference_captions: captions for methods that distil: a text file with one per line, a table of Conceptual Captions,
            shards, or `random` (`random:1000x10`) for texts of random tokens.
        dataset: the one whose classes `cil` splits.
        steps: tasks of `cil` with an equal share of the classes; 10 by default.
        cache: folder for decoded and resized images and for features of frozen models, `none` to keep nothing, or `auto`: the
            user's cache folder (`$CLK_CACHE`, else `~/.cache/cl-kernels`), for scenarios whose images lie on disk.
        cache_gib: what may lie there, in GiB; the oldest is removed first. 2 GiB of the disk stay free.
        base_classes: classes of a further first task of `cil`; by default 100 for TinyImageNet, as published, and none elsewhere.
    """

    root: Path | None = None
    validation_fraction: float | None = None
    test_fraction: float = 0.2
    split_seed: int = 0
    split: Literal["zscl", "coop"] = "zscl"
    shots: int | None = None
    sizes: Literal["published", "any"] = "published"
    reference_images: Path | None = None
    reference_captions: Path | None = None
    reference_limit: int | None = None
    dataset: str | None = None
    steps: int | None = None
    base_classes: int | None = None
    cache: str = "auto"
    cache_gib: float = 16.0

    def protocol(self, scenario: str) -> str:
        """The section of the methods' files of settings that holds for ``scenario`` with these options."""
        if scenario not in ("mtil", "xtail"):
            return scenario
        return "mtil" if self.shots is None else "mtil_few_shot"


def load(name: str, options: ScenarioOptions | None = None, *, order: str = "I") -> Scenario:
    """The scenario ``name`` with its tasks in the given order, its images cached as the options say.

    Args:
        name: a key of :data:`SCENARIOS`.
        options: where the data is; defaults for scenarios that need none.
        order: ``"I"`` or ``"II"`` for ``mini``. For ``folders`` comma-separated task names, or ``"I"`` (sorted by name)
            and ``"II"`` (the reverse). For ``mtil`` the published orders ``"I"`` and ``"II"``, ``"X-TAIL"``, or comma-separated
            datasets; for ``xtail`` ``"I"`` or comma-separated datasets. For ``cil`` the order of the classes: ``"I"``
            (published), ``"labels"``, ``"random-SEED"`` or a YAML file.

    Raises:
        DataError: unknown name or order, or data that is missing or damaged; the message says what to do.
    """
    options = options or ScenarioOptions()
    folder = cache_for(name, options)
    scenario = _arranged(name, options, order)
    own = read_reference(options.reference_images, options.reference_captions, scenario.reference)
    if options.reference_limit is not None:
        own = drawn(own, options.reference_limit, options.split_seed)
    scenario = replace(scenario, reference=own)
    return scenario if folder is None else _cached(scenario, folder)


def cache_for(name: str, options: ScenarioOptions) -> CacheFolder | None:
    """Where derived data of the scenario ``name`` is kept; None for nowhere.

    Raises:
        DataError: the folder that was asked for is none or cannot be written, or the size is not positive.
    """
    if not options.cache_gib > 0:
        raise DataError(
            f"data.cache_gib: expected a number > 0, got {options.cache_gib}; --data.cache none keeps nothing"
        )
    if options.cache == "none" or (options.cache == "auto" and name == "mini") or not CacheFolder.supported():
        return None
    path = cache_folder() if options.cache == "auto" else Path(options.cache).expanduser().absolute()
    if options.cache != "auto":
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise DataError(f"data.cache: {there} is a file; give a folder, or none")
        if not os.access(there, os.W_OK | os.X_OK):
            raise DataError(f"data.cache: {there} cannot be written; give another folder, or none")
    return CacheFolder(path, round(options.cache_gib * 2**30))


def _cached(scenario: Scenario, folder: CacheFolder) -> Scenario:
    known: dict[int, ImageSource] = {}
    tasks = tuple(
        replace(
            task,
            train=cached(task.train, folder, known),
            validation=cached(task.validation, folder, known),
            test=cached(task.test, folder, known),
        )
        for task in scenario.tasks
    )
    reference = scenario.reference
    if reference is not None:
        reference = replace(reference, images=cached(reference.images, folder, known), features=folder)
    return replace(scenario, tasks=tasks, reference=reference)


def _arranged(name: str, options: ScenarioOptions, order: str) -> Scenario:
    if name == "mini":
        from cl_methods.scenarios import mini

        if order not in ("I", "II"):
            raise DataError(f"order: scenario mini has the orders I and II, got {order!r}")
        return mini.load_scenario(order)
    if name == "mtil":
        from cl_methods.scenarios import mtil

        return mtil.load_scenario(options, order)
    if name == "xtail":
        from cl_methods.scenarios import xtail

        return xtail.load_scenario(options, order)
    if name == "cil":
        from cl_methods.scenarios import cil

        return cil.load_scenario(options, order)
    if name == "folders":
        if options.root is None:
            raise DataError("data.root: scenario folders needs the folder that holds one sub-folder per task")
        from cl_methods.scenarios import folders

        chosen = None if order == "I" else [name.strip() for name in order.split(",")]
        if order == "II":
            chosen = folders.task_names(options.root)[::-1]
        scenario = folders.load_scenario(
            options.root,
            chosen,
            validation_fraction=0.1 if options.validation_fraction is None else options.validation_fraction,
            test_fraction=options.test_fraction,
            seed=options.split_seed,
        )
        return replace(scenario, order=order)
    raise DataError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {name!r}")

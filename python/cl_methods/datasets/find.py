"""From a folder to a dataset: which layout it lies in, how it is split, and what to do where it is not there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cl_methods.datasets.coop import read_split_file
from cl_methods.datasets.hugging_face import read_tables
from cl_methods.datasets.image_folders import read_image_folders
from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.listing import Listing
from cl_methods.datasets.original import READERS
from cl_methods.datasets.sources import take
from cl_methods.datasets.specification import DATASETS, DatasetSpec
from cl_methods.datasets.splits import coop_shots, first_shots, set_aside, zscl_split
from cl_methods.datasets.task import Task
from cl_methods.datasets.texts import Family
from cl_methods.datasets.webdataset import read_shards

COOP_FILES = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md links to it"
_VALIDATION_SHOTS = 4
_LOOKED_INTO = 50


@dataclass(frozen=True)
class SplitOptions:
    """How a dataset is split.

    Attributes:
        family: of splits, class names and prompts.
        shots: training images per class; None for all of them.
        validation_fraction: share of the training images that becomes validation where the family has none.
        seed: of few-shot draws, of validation images, and of the validation images that DIKI draws for MNIST and CIFAR100.
        sizes: ``published`` refuses a dataset whose splits have other sizes than the published ones, ``any`` takes it as it is.
    """

    family: Family = "zscl"
    shots: int | None = None
    validation_fraction: float = 0.0
    seed: int = 0
    sizes: Literal["published", "any"] = "published"

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise DataError(f"data.shots: expected a number >= 1, got {self.shots}")
        if not 0 <= self.validation_fraction < 1:
            raise DataError(
                f"data.validation_fraction: expected a share from 0 to below 1, got {self.validation_fraction}"
            )


@dataclass(frozen=True)
class Found:
    """A dataset that was found and split.

    Attributes:
        task: with the images of each split.
        layout, place: what it was found as, and where.
        family: of the splits.
    """

    task: Task
    layout: str
    place: Path
    family: Family

    def fingerprint(self) -> str:
        """sha256 over the images of training, validation and test, in twelve digits."""
        splits = (self.task.train, self.task.validation, self.task.test)
        return hashlib.sha256("".join(split.fingerprint() for split in splits).encode()).hexdigest()[:12]


class DataNotFoundError(DataError):
    """A dataset is in none of its places; the message says where to put what."""


def find_dataset(spec: DatasetSpec, root: Path, options: SplitOptions) -> Found:
    """A dataset below ``root`` in whatever layout it has there, split by the rules of a family.

    Raises:
        DataNotFoundError: it is in none of the places.
        DataError: it is there but damaged, or its splits have other than the published sizes.
    """
    listing = find_listing(spec, root, options.family)
    classes = spec.classes(options.family)
    train, validation, test = _split(spec, listing, options)
    _check_sizes(spec, listing, options, (len(train), len(validation), len(test)))
    if options.validation_fraction and len(validation) == 0:
        stays, aside = set_aside(train.labels, options.validation_fraction, options.seed, spec.name, "validation")
        train, validation = take(train, stays), take(train, aside)
    if options.shots is not None:
        train, validation = _few(spec, train, validation, options)
    task = Task(spec.name, listing.names or classes.names, classes.templates, train, validation, test)
    return Found(task, listing.layout, listing.place, options.family)


def find_listing(spec: DatasetSpec, root: Path, family: Family) -> Listing:
    """The first layout in which the dataset is there, before it is split.

    Raises:
        DataNotFoundError: it is in none of the places.
        DataError: it is there but damaged.
    """
    require_root(root)
    classes = spec.classes(family)
    by_split_file = family == "coop" and spec.split_file is not None
    for place in _present(root, spec.places):
        if by_split_file and spec.split_file is not None:
            if (place / spec.split_file).is_file():
                return read_split_file(place / spec.split_file, spec.images, classes)
        elif _marked(spec, place):
            return Listing("original files", place, READERS[spec.name](place, classes))
    for folder in _present(root, spec.copies):
        for read in (read_image_folders, read_shards, read_tables):
            listing = read(folder, classes)
            if listing is not None:
                return listing
    raise DataNotFoundError(where_to_put(spec, root, family))


def require_root(root: Path) -> None:
    """The folder that holds the datasets.

    Raises:
        DataError: it is none.
    """
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a directory; give the folder that holds one folder per dataset")


def where_to_put(spec: DatasetSpec, root: Path, family: Family) -> str:
    """What is missing for a dataset, and where to put it."""
    if family == "coop" and spec.split_file is not None:
        there = next((place for place in _present(root, spec.places) if _marked(spec, place)), None)
        if there is not None:
            return (
                f"{there / spec.split_file} is missing, CoOp's list of the splits of {spec.name}; the images are there. "
                f"{COOP_FILES}, or ask for --split zscl"
            )
        folder = root / spec.coop_place
        wanted = f"{folder}, with {spec.split_file} in it ({COOP_FILES}) and the images"
        wanted += f" in {folder / spec.images[0]}" if spec.images[0] else " beside it"
    else:
        wanted = f"{root / spec.places[0]}, with {spec.contents} in it"
    return f"{spec.name} is not in {root}. Put it into {wanted}, from {spec.source}{or_a_copy(root / spec.copies[0])}"


def or_a_copy(place: Path | str) -> str:
    """The end of :func:`where_to_put`: that a copy in another layout may lie in ``place``."""
    layouts = "image folders, WebDataset shards or Hugging Face tables"
    return f"; or a copy as {layouts} into {place}. docs/datasets.md has all layouts"


def other_root(root: Path) -> Path | None:
    """Where ``root`` holds no dataset: the folder above it, or the first directly below it, that does; None if there is none."""
    if _any_dataset(root):
        return None
    below = sorted(folder for folder in root.iterdir() if folder.is_dir())
    own = {place.split("/")[0] for spec in DATASETS.values() for place in spec.places}
    above = [root.absolute().parent] if root.absolute().name in own else []
    return next((folder for folder in (*above, *below[:_LOOKED_INTO]) if _any_dataset(folder)), None)


def _any_dataset(root: Path) -> bool:
    return any(_marked(spec, place) for spec in DATASETS.values() for place in _present(root, spec.places))


def _marked(spec: DatasetSpec, place: Path) -> bool:
    return any((place / marker).exists() for marker in spec.markers)


def _present(root: Path, places: tuple[str, ...]) -> Iterator[Path]:
    seen = set()
    for place in places:
        folder = root / place
        if folder.is_dir() and folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield folder


def _split(spec: DatasetSpec, listing: Listing, options: SplitOptions) -> tuple[ImageSource, ImageSource, ImageSource]:
    parts = listing.parts
    if "all" in parts:
        if not spec.single or (options.family == "coop" and spec.split_file is not None):
            given = f"{listing.place} has one folder per class but no split"
            raise DataError(f"{given}; the family {options.family} needs the published split of {spec.name}")
        training, testing = zscl_split(len(parts["all"]))
        return take(parts["all"], training), _nothing(parts["all"]), take(parts["all"], testing)
    train, test = parts["train"], parts["test"]
    validation = parts.get("val")
    if validation is None and options.family == "coop" and spec.sizes["coop"][1]:
        if spec.split_file is not None:
            raise DataError(f"{listing.place} has no validation images; the family coop needs {spec.split_file}")
        stays, aside = set_aside(train.labels, 0.2, options.seed, spec.name, "DIKI")
        train, validation = take(train, stays), take(train, aside)
    return train, validation if validation is not None else _nothing(train), test


def _check_sizes(spec: DatasetSpec, listing: Listing, options: SplitOptions, found: tuple[int, int, int]) -> None:
    """Splits must have the published sizes; only a validation split that the family ZSCL does not use may be absent."""
    train, validation, test = spec.sizes[options.family]
    published = (found[0] if train is None else train, validation, test)
    same = found == published or (options.family == "zscl" and found == (published[0], 0, published[2]))
    if options.sizes == "any" or same:
        return
    other: Family = "coop" if options.family == "zscl" else "zscl"
    hint = f"; these are the sizes of the family {other}" if found == spec.sizes[other] else ""
    raise DataError(
        f"{listing.place} gives {_said(found)} images of {spec.name} for training, validation and test where the published split "
        f"{options.family} has {_said(published)}{hint}. Images are missing or the split is another one; `--data.sizes any` "
        "(of `clk data check`: `--sizes any`) takes it as it is"
    )


def _said(sizes: tuple[int, int, int]) -> str:
    return " / ".join(f"{size:,}" for size in sizes)


def _few(
    spec: DatasetSpec, train: ImageSource, validation: ImageSource, options: SplitOptions
) -> tuple[ImageSource, ImageSource]:
    shots = options.shots or 0
    if options.family == "zscl":
        return take(train, first_shots(train.labels, shots, options.seed, spec.name, "shots")), validation
    generator = random.Random(options.seed)
    chosen = coop_shots(train.labels, shots, generator)
    kept = coop_shots(validation.labels, min(shots, _VALIDATION_SHOTS), generator)
    return take(train, chosen), take(validation, kept)


def _nothing(source: ImageSource) -> ImageSource:
    return take(source, torch.empty(0, dtype=torch.int64))

"""Copies of a dataset as WebDataset shards: ``train/*.tar`` and ``test/*.tar``, as CLIP_benchmark's ``wds_*`` repositories."""

from __future__ import annotations

from pathlib import Path

import torch

from cl_methods.datasets.archives import Member, parts, shards
from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.listing import IMAGE_SUFFIXES, SPLIT_NAMES, Listing, lines, require_all_classes
from cl_methods.datasets.sources import TarImages
from cl_methods.datasets.texts import Classes

_CLASS = frozenset([".cls"])


def read_shards(folder: Path, classes: Classes) -> Listing | None:
    """A dataset from tar shards whose samples are ``KEY.jpg`` (or another image) and ``KEY.cls``; None if there are none.

    ``cls`` is the number of a line of ``classnames.txt``, or without that file the label in torchvision's order. Shards are read in
    place, so they must not be compressed.

    Args:
        folder: holds ``train``, ``test`` and perhaps ``val`` with the shards, and ``nshards.txt`` in each.
        classes: of the dataset.

    Raises:
        DataError: a split or a shard is missing, a shard is cut off or compressed, or samples are incomplete.
    """
    splits = {
        path.name: SPLIT_NAMES[path.name.lower()]
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name.lower() in SPLIT_NAMES and shards(path)
    }
    if not splits:
        return None
    missing = sorted({"train", "test"} - set(splits.values()))
    if missing:
        raise DataError(f"{folder} has {', '.join(splits)} but no shards in {folder / missing[0]}")
    listed = folder / "classnames.txt"
    order = classes.labels_in_order(lines(listed), listed) if listed.is_file() else list(range(len(classes)))
    found: dict[str, ImageSource] = {}
    for name, part in splits.items():
        found[part] = _split(folder, name, order)
        require_all_classes(found[part], classes, folder / name)
    return Listing("WebDataset", folder, found)


def _split(folder: Path, split: str, order: list[int]) -> TarImages:
    archives = shards(folder / split)
    counted = folder / split / "nshards.txt"
    if counted.is_file() and lines(counted)[0] != str(len(archives)):
        raise DataError(f"{counted} says {lines(counted)[0]} shards, found {len(archives)}; fetch the missing ones")
    members: list[Member] = []
    labels: list[int] = []
    for shard in archives:
        for member, label in _samples(shard, f"{split}/{shard.name}"):
            if not 0 <= label < len(order):
                raise DataError(f"{shard}: {member.name} has the class {label}; expected 0 to {len(order) - 1}")
            members.append(member)
            labels.append(order[label])
    return TarImages(folder, members, torch.tensor(labels, dtype=torch.int64))


def _samples(shard: Path, name: str) -> list[tuple[Member, int]]:
    """Image and class of every sample of a shard, in its order."""
    images: dict[str, Member] = {}
    numbers: dict[str, int] = {}
    for part in parts(shard, name, _CLASS):
        if part.suffix in IMAGE_SUFFIXES:
            images[part.key] = part.member
        elif part.suffix in _CLASS:
            try:
                numbers[part.key] = int(part.content.decode())
            except ValueError as error:
                raise DataError(
                    f"{shard}: {part.member.name} holds no number ({error}); fetch the shard again"
                ) from error
    alone = sorted(set(images) ^ set(numbers))
    if alone:
        raise DataError(f"{shard}: sample {alone[0]} lacks its {'class' if alone[0] in images else 'image'}")
    if not images:
        raise DataError(f"{shard} holds no sample (KEY.jpg with KEY.cls); fetch it again")
    return [(member, numbers[key]) for key, member in images.items()]

"""Copies of a dataset as WebDataset shards: ``train/*.tar`` and ``test/*.tar``, as CLIP_benchmark's ``wds_*`` repositories."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch

from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.listing import IMAGE_SUFFIXES, SPLIT_NAMES, Listing, lines, require_all_classes
from cl_methods.datasets.sources import Member, TarImages
from cl_methods.datasets.texts import Classes


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
        if path.is_dir() and path.name.lower() in SPLIT_NAMES and _shards(path)
    }
    if not splits:
        return None
    missing = sorted({"train", "test"} - set(splits.values()))
    if missing:
        raise DataError(f"{folder} has {', '.join(splits)} but no shards in {folder / missing[0]}")
    listed = folder / "classnames.txt"
    order = classes.labels_in_order(lines(listed), listed) if listed.is_file() else list(range(len(classes)))
    parts: dict[str, ImageSource] = {}
    for name, part in splits.items():
        parts[part] = _split(folder, name, order)
        require_all_classes(parts[part], classes, folder / name)
    return Listing("WebDataset", folder, parts)


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith((".tar", ".tar.gz", ".tgz")))


def _split(folder: Path, split: str, order: list[int]) -> TarImages:
    shards = _shards(folder / split)
    counted = folder / split / "nshards.txt"
    if counted.is_file() and lines(counted)[0] != str(len(shards)):
        raise DataError(f"{counted} says {lines(counted)[0]} shards, found {len(shards)}; fetch the missing ones")
    members: list[Member] = []
    labels: list[int] = []
    for shard in shards:
        for member, label in _samples(shard, f"{split}/{shard.name}"):
            if not 0 <= label < len(order):
                raise DataError(f"{shard}: {member.name} has the class {label}; expected 0 to {len(order) - 1}")
            members.append(member)
            labels.append(order[label])
    return TarImages(folder, members, torch.tensor(labels, dtype=torch.int64))


def _require_end(shard: Path) -> None:
    """An archive ends with two empty blocks; one that was cut off between two members does not, and reads without an error."""
    with shard.open("rb") as file:
        if shard.suffix == ".tar" and file.seek(0, 2) >= 1024:
            file.seek(-1024, 2)
            if any(file.read()):
                raise DataError(f"{shard} is cut off: it does not end as a tar archive does; fetch it again")


def _samples(shard: Path, name: str) -> list[tuple[Member, int]]:
    """Image and class of every sample of a shard, in its order."""
    images: dict[str, Member] = {}
    numbers: dict[str, int] = {}
    size = shard.stat().st_size
    _require_end(shard)
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if not entry.isfile():
                    continue
                if entry.offset_data + entry.size > size:
                    raise DataError(f"{shard} is cut off inside {entry.name}; fetch it again")
                place, slash, base = entry.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key = place + slash + stem
                if f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = Member(name, entry.name, entry.offset_data, entry.size)
                elif suffix == "cls":
                    file = archive.extractfile(entry)
                    numbers[key] = int(file.read().decode()) if file is not None else -1
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{shard} is cut off, compressed or not a tar archive ({error}); fetch it again") from error
    alone = sorted(set(images) ^ set(numbers))
    if alone:
        raise DataError(f"{shard}: sample {alone[0]} lacks its {'class' if alone[0] in images else 'image'}")
    if not images:
        raise DataError(f"{shard} holds no sample (KEY.jpg with KEY.cls); fetch it again")
    return [(member, numbers[key]) for key, member in images.items()]

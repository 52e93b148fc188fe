"""Images and texts that distillation may look at, each chosen for itself, in the forms that people have them in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cl_methods.datasets.archives import SUFFIXES, Member, parts, shards
from cl_methods.datasets.captions import random_texts_of, read_captions, read_rows, read_shard_captions
from cl_methods.datasets.images import DataError, FileImages, ImageSource
from cl_methods.datasets.listing import IMAGE_SUFFIXES, file_images, images_below
from cl_methods.datasets.sources import TarImages, take
from cl_methods.datasets.task import NO_IMAGES, Reference
from cl_methods.seeding import derive_seed

_OPTION = "data.reference_images"
_FILE_COLUMNS = ("filepath", "path", "file")


def read_reference(images: Path | None, captions: Path | None, own: Reference | None = None) -> Reference | None:
    """Reference data from what was given; what was not given stays as the scenario has it.

    Args:
        images: see :func:`read_reference_images`.
        captions: a text file or a table (:func:`~cl_methods.datasets.captions.read_captions`), tar shards or a folder of them
            with captions, or ``random`` for texts of random tokens.
        own: reference data that the scenario brings.

    Returns:
        ``own`` if nothing was given. Without images there are none, without captions there are none: methods that need what is
        missing refuse.

    Raises:
        DataError: something is missing, damaged or empty.
    """
    if images is None and captions is None:
        return own
    found = own if own is not None else Reference(NO_IMAGES, ())
    if images is not None:
        found = replace(found, images=read_reference_images(images))
    if captions is not None:
        random = random_texts_of(str(captions))
        archives = [] if random is not None else _archives(captions, "data.reference_captions")
        texts = () if random is not None else read_shard_captions(archives) if archives else read_captions(captions)
        found = replace(found, captions=texts, random_texts=random)
    return found


def drawn(reference: Reference | None, count: int, seed: int) -> Reference:
    """Reference data with ``count`` of its images, in their order; with all of them where there are no more.

    Args:
        reference: images in an order that is the same on every machine.
        count: at least 1.
        seed: with the number of images, all that the draw depends on.

    Raises:
        DataError: there are no images to draw from, or ``count`` is too small.
    """
    if count < 1:
        raise DataError(f"data.reference_limit: expected a number of images >= 1, got {count}")
    if reference is None or not reference.has_images:
        raise DataError(
            f"data.reference_limit: there are no reference images to draw {count} from; give --data.reference-images"
        )
    total = len(reference.images)
    generator = torch.Generator().manual_seed(derive_seed(seed, "reference images"))
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    return reference if count >= total else replace(reference, images=take(reference.images, chosen))


def read_reference_images(place: Path) -> ImageSource:
    """Unlabelled images, all labels -1.

    Args:
        place: a folder with images at any depth, whose folders' names are not looked at (ImageNet's ``train``); a tar archive or a
            folder of them, with or without captions (WebDataset); or a tab-separated table with a column ``filepath`` of paths
            from the table's folder, as Conceptual Captions is downloaded.

    Raises:
        DataError: there is nothing, or no image in it; an archive is damaged; or the table lists files that are not there.
    """
    archives = _archives(place, _OPTION)
    if archives:
        return _from_archives(archives)
    if place.is_file():
        return _from_table(place)
    if not place.is_dir():
        raise DataError(f"{_OPTION}: {place} is not a directory, a tar archive or a table of files")
    paths = images_below(place)
    if not paths:
        raise DataError(f"{_OPTION}: {place} holds no image and no tar archive")
    return FileImages(place, paths, _unlabelled(len(paths)))


def _archives(place: Path, option: str) -> list[Path]:
    """The archive itself, or those of a folder that holds nothing but archives to read; none for other files and folders."""
    if place.is_dir():
        found = shards(place)
        if found and images_below(place):
            raise DataError(f"{option}: {place} holds both images and tar archives; give a folder with one of the two")
        return found
    if place.name.endswith(SUFFIXES):
        if not place.is_file():
            raise DataError(f"{option}: {place} is not there")
        return [place]
    return []


def _from_archives(archives: list[Path]) -> TarImages:
    members: list[Member] = []
    for shard in archives:
        found = [part.member for part in parts(shard, shard.name, frozenset()) if part.suffix in IMAGE_SUFFIXES]
        if not found:
            raise DataError(f"{_OPTION}: {shard} holds no image; fetch it again, or take it out of the folder")
        members += found
    return TarImages(archives[0].parent, members, _unlabelled(len(members)))


def _from_table(table: Path) -> FileImages:
    rows = read_rows(table, _OPTION)
    header = rows[0][1] if rows else []
    column = next((header.index(name) for name in _FILE_COLUMNS if name in header), None)
    if column is None:
        raise DataError(f"{_OPTION}: {table} has no column {' or '.join(_FILE_COLUMNS)} in its first line")
    short = next((number for number, row in rows[1:] if len(row) <= column), None)
    if short is not None:
        raise DataError(f"{_OPTION}: {table} line {short} ends before the column {header[column]}")
    paths = [row[column].strip() for _, row in rows[1:]]
    if not paths:
        raise DataError(f"{_OPTION}: {table} lists no image")
    return file_images(table.parent, paths, [-1] * len(paths), table)


def _unlabelled(count: int) -> torch.Tensor:
    return torch.full((count,), -1, dtype=torch.int64)

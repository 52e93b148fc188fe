"""What a layout on disk lists, and the checks that all layouts share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cl_methods.datasets.images import DataError, FileImages, ImageSource
from cl_methods.datasets.texts import Classes

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"])

SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
"""What copies call their splits -> what they are called here."""


@dataclass(frozen=True)
class Listing:
    """A dataset as a layout lists it, before any split is drawn.

    Attributes:
        layout: what it was found as.
        place: the folder.
        parts: ``train`` and ``test``, perhaps ``val``; or ``all`` where the layout has no split.
        names: class names by label where the layout decides them, else None.
    """

    layout: str
    place: Path
    parts: dict[str, ImageSource]
    names: tuple[str, ...] | None = None


def file_images(root: Path, paths: Sequence[str], labels: Sequence[int], listed_in: object) -> FileImages:
    """Files that a list names, after making sure that every one of them is there, with one look at each folder.

    Raises:
        DataError: files are missing; the first is named, and how many there are.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in present:
            place = root / folder
            present[folder] = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
        if name not in present[folder]:
            missing.append(path)
    if missing:
        more = f" and {len(missing) - 1} more of the {len(paths)} images" if len(missing) > 1 else ""
        raise DataError(
            f"{listed_in} lists {root / missing[0]}, which is not there{more}; extract the archive again, completely"
        )
    return FileImages(root, paths, torch.tensor(labels, dtype=torch.int64))


def images_below(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[str]:
    """Relative paths of the images below ``folder``, sorted, so that the list is the same on every machine."""
    wanted = tuple(suffixes)
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [prefix + name for name in names if name.lower().endswith(wanted) and not name.startswith(".")]
    return sorted(found)


def lines(path: Path) -> list[str]:
    """The lines of a metadata file that are not empty.

    Raises:
        DataError: the file is missing, empty or not text.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; extract the archive that it belongs to again")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file ({error}); replace it") from error
    if not found:
        raise DataError(f"{path} is empty; replace it")
    return found


def require_folder(path: Path) -> Path:
    """``path`` itself.

    Raises:
        DataError: it is not a folder.
    """
    if not path.is_dir():
        raise DataError(f"{path} is missing; extract the archive that it belongs to again")
    return path


def require_all_classes(source: ImageSource, classes: Classes, where: object) -> None:
    """Every class must have an image.

    Raises:
        DataError: names classes that have none.
    """
    present = set(source.labels.tolist())
    missing = [key for label, key in enumerate(classes.keys) if label not in present]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{where} has no image of {', '.join(missing[:3])}{more}; extract the archive again, completely"
        )

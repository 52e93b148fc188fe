"""Copies of a dataset as image folders: ``train/CLASS/*`` and ``test/CLASS/*``, or one folder per class."""

from __future__ import annotations

from pathlib import Path

from cl_methods.datasets.images import DataError, FileImages, ImageSource
from cl_methods.datasets.listing import SPLIT_NAMES, Listing, file_images, images_below, require_all_classes
from cl_methods.datasets.texts import Classes


def read_image_folders(folder: Path, classes: Classes) -> Listing | None:
    """A dataset from folders named after its classes, in whatever spelling; None if ``folder`` is laid out otherwise.

    Args:
        folder: holds ``train``, ``test`` and perhaps ``val``, each with a folder per class; or a folder per class.
        classes: of the dataset.

    Raises:
        DataError: a split is missing, a folder is no class, or a class has no folder or no image.
    """
    folders = _folders(folder)
    splits = {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}
    if splits:
        if any(not _folders(folder / name) for name in splits):
            return None  # shards or tables, not images
        missing = sorted({"train", "test"} - set(splits.values()))
        if missing:
            raise DataError(
                f"{folder} has {', '.join(sorted(splits))} but no {missing[0]}: {folder / missing[0]} is missing"
            )
        parts: dict[str, ImageSource] = {part: _split(folder / name, classes) for name, part in splits.items()}
        return Listing("image folders", folder, parts)
    if not any(classes.knows(name) for name in folders):
        return None
    return Listing("image folders", folder, {"all": _split(folder, classes)})


def _split(folder: Path, classes: Classes) -> FileImages:
    names = _folders(folder)
    label_of = dict(zip(names, classes.labels_of(names, folder), strict=True))
    paths = [path for path in images_below(folder) if "/" in path]
    found = file_images(folder, paths, [label_of[path.partition("/")[0]] for path in paths], folder)
    require_all_classes(found, classes, folder)
    return found


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))

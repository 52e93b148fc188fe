"""CoOp's split files: ``split_zhou_NAME.json`` beside the dataset's own images."""

from __future__ import annotations

import json
from pathlib import Path

from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.listing import Listing, file_images, require_all_classes
from cl_methods.datasets.texts import Classes

PARTS = ("train", "val", "test")


def read_split_file(path: Path, image_folders: tuple[str, ...], classes: Classes) -> Listing:
    """A dataset as CoOp split it, with the class names that the file gives.

    The labels of the file are those of CoOp; classes are matched by name, and the few whose names are spelt otherwise than here by
    their place.

    Args:
        path: mapping of ``train``, ``val`` and ``test`` to rows of image, label and class name.
        image_folders: folders beside it from which the images' paths may start; the first that exists is taken.
        classes: of the family ``coop``.

    Raises:
        DataError: the file is not such a split file or is of another dataset, an image is in two parts, or images are missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {part: [(str(image), int(label), str(name)) for image, label, name in content[part]] for part in PARTS}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is cut off or is not a split file of CoOp with train, val and test ({error!r}); replace it"
        ) from error
    place = next((path.parent / folder for folder in image_folders if (path.parent / folder).is_dir()), None)
    if place is None:
        raise DataError(f"{path} is there, but its images are not: {path.parent / image_folders[0]} is missing")
    for part, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = {image for image, _, _ in rows[part]} & {image for image, _, _ in rows[other]}
        if shared:
            raise DataError(f"{path}: {min(shared)} is in {part} and in {other}; replace the file")
    by_label = _names(path, rows)
    order = classes.labels_in_order(list(by_label.values()), path)
    label_of = dict(zip(by_label, order, strict=True))
    names = list(classes.names)
    for label, name in by_label.items():
        names[label_of[label]] = name.replace("_", " ")
    parts: dict[str, ImageSource] = {
        part: file_images(place, [image for image, _, _ in listed], [label_of[label] for _, label, _ in listed], path)
        for part, listed in rows.items()
    }
    for part in ("train", "test"):
        require_all_classes(parts[part], classes, f"{path}, {part},")
    return Listing("CoOp", path.parent, parts, tuple(names))


def _names(path: Path, rows: dict[str, list[tuple[str, int, str]]]) -> dict[int, str]:
    """The name of every label, by label."""
    found: dict[int, str] = {}
    for _, label, name in (row for listed in rows.values() for row in listed):
        if found.setdefault(label, name) != name:
            raise DataError(f"{path}: label {label} is called {found[label]!r} and {name!r}; replace the file")
    return {label: found[label] for label in sorted(found)}

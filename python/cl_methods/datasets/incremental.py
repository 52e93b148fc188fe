"""Own files of the datasets of class-incremental protocols: CIFAR10, TinyImageNet, ImageNet, ImageNet-R and CUB-200-2011."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cl_methods.datasets.binary import read_cifar, read_cifar_pickle
from cl_methods.datasets.images import DataError, FileImages, ImageSource
from cl_methods.datasets.listing import file_images, images_below, lines, require_all_classes, require_folder
from cl_methods.datasets.sources import ArrayImages
from cl_methods.datasets.texts import Classes

_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def read_cifar10(place: Path, classes: Classes) -> dict[str, ImageSource]:
    """CIFAR10 from its five training batches and its test batch.

    Raises:
        DataError: a batch is missing or cut off, or the classes are others.
    """
    names = read_cifar_pickle(place / "batches.meta").get("label_names", [])
    if tuple(names) != classes.keys:
        raise DataError(f"{place / 'batches.meta'}: label_names are not the {len(classes)} classes of CIFAR10")
    batches = [read_cifar(place / name, "labels", len(classes)) for name in _BATCHES]
    pixels, labels = (
        np.concatenate([batch.pixels for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )
    return {"train": ArrayImages(pixels, labels), "test": read_cifar(place / "test_batch", "labels", len(classes))}


def read_tiny_imagenet(place: Path, classes: Classes) -> dict[str, ImageSource]:
    """TinyImageNet, tested on its validation images: those of the test set have no labels.

    Raises:
        DataError: a list, a class or an image is missing.
    """
    classes.labels_of(lines(place / "wnids.txt"), place / "wnids.txt")
    annotations = place / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in lines(annotations)]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{annotations} is not a table of images and classes; replace it")
    labels = [classes.label(row[1], annotations) for row in rows]
    test = file_images(place, [f"val/images/{row[0]}" for row in rows], labels, annotations)
    require_all_classes(test, classes, annotations)
    return {"train": _by_synset(place, "train", classes), "test": test}


def read_imagenet(place: Path, classes: Classes) -> dict[str, ImageSource]:
    """ImageNet or the classes of it that a subset has, tested on the validation images in folders of their classes.

    Raises:
        DataError: a class is missing or has no image.
    """
    return {part: _by_synset(place, folder, classes) for part, folder in (("train", "train"), ("test", "val"))}


def read_imagenet_r(place: Path, classes: Classes) -> dict[str, ImageSource]:
    """ImageNet-R, which comes without a split.

    Raises:
        DataError: a class is missing or has no image.
    """
    return {"all": _by_synset(place, "", classes)}


def read_cub200(place: Path, classes: Classes) -> dict[str, ImageSource]:
    """CUB-200-2011 in its own split.

    Raises:
        DataError: a list or an image is missing, the lists do not fit each other, or the classes are others.
    """
    names = dict(_numbered(place / "classes.txt"))
    classes.labels_of(list(names.values()), place / "classes.txt")
    paths, owners, trains = (
        dict(_numbered(place / name)) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    for name, listed in (("image_class_labels.txt", owners), ("train_test_split.txt", trains)):
        if listed.keys() != paths.keys():
            raise DataError(f"{place / name} and {place / 'images.txt'} do not number the same images; replace both")
    unknown = next((number for number in owners.values() if number not in names), None)
    if unknown is not None:
        raise DataError(f"{place / 'image_class_labels.txt'} names class {unknown}, which classes.txt does not have")
    parts: dict[str, ImageSource] = {}
    for part, flag in (("train", "1"), ("test", "0")):
        images = [number for number in paths if trains[number] == flag]
        labels = [classes.label(names[owners[number]], place / "classes.txt") for number in images]
        parts[part] = file_images(place, [f"images/{paths[number]}" for number in images], labels, place / "images.txt")
        require_all_classes(parts[part], classes, f"{place / 'train_test_split.txt'}, {part},")
    return parts


def _numbered(path: Path) -> list[tuple[str, str]]:
    """Rows of a number and a value."""
    rows = [line.split() for line in lines(path)]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise DataError(f"{path}: {' '.join(wrong)!r} is not a number and a value; replace the file")
    return [(row[0], row[1]) for row in rows]


def _by_synset(place: Path, part: str, classes: Classes) -> FileImages:
    """Images of ``part/SYNSET`` for every class, sorted within each."""
    paths, labels = [], []
    for label, key in enumerate(classes.keys):
        found = images_below(require_folder(place / part / key))
        paths += [f"{part}/{key}/{path}".lstrip("/") for path in found]
        labels += [label] * len(found)
    source = FileImages(place, paths, torch.tensor(labels, dtype=torch.int64))
    require_all_classes(source, classes, place / part)
    return source

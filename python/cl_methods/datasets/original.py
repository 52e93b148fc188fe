"""The datasets' own files, as torchvision, CoOp and DIKI lay them out: one reader per dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cl_methods.datasets.binary import read_cifar, read_cifar_pickle, read_idx_pair
from cl_methods.datasets.images import DataError, FileImages, ImageSource
from cl_methods.datasets.incremental import (
    read_cifar10,
    read_cub200,
    read_imagenet,
    read_imagenet_r,
    read_tiny_imagenet,
)
from cl_methods.datasets.listing import file_images, images_below, lines, require_all_classes, require_folder
from cl_methods.datasets.texts import Classes

Parts = dict[str, ImageSource]


def _aircraft(place: Path, classes: Classes) -> Parts:
    classes.labels_of(lines(place / "variants.txt"), place / "variants.txt")
    require_folder(place / "images")
    parts: Parts = {}
    for part in ("train", "val", "test"):
        listed = place / f"images_variant_{part}.txt"
        rows = [line.partition(" ") for line in lines(listed)]
        labels = [classes.label(name.strip(), listed) for _, _, name in rows]
        parts[part] = file_images(place, [f"images/{image}.jpg" for image, _, _ in rows], labels, listed)
    return parts


def _caltech101(place: Path, classes: Classes) -> Parts:
    folder = require_folder(place / "101_ObjectCategories")
    return {"all": _by_folder(folder, classes, "image_", ignored=("BACKGROUND_Google",))}


def _cifar100(place: Path, classes: Classes) -> Parts:
    names = read_cifar_pickle(place / "meta").get("fine_label_names", [])
    if tuple(names) != classes.keys:
        raise DataError(f"{place / 'meta'}: fine_label_names are not the {len(classes)} classes of CIFAR100")
    return {part: read_cifar(place / part, "fine_labels", len(classes)) for part in ("train", "test")}


def _dtd(place: Path, classes: Classes) -> Parts:
    parts: Parts = {}
    for part in ("train", "val", "test"):
        listed = place / "labels" / f"{part}1.txt"
        rows = lines(listed)
        labels = [classes.label(row.partition("/")[0], listed) for row in rows]
        parts[part] = file_images(place, [f"images/{row}" for row in rows], labels, listed)
    return parts


def _eurosat(place: Path, classes: Classes) -> Parts:
    return {"all": _by_folder(require_folder(place / "2750"), classes, "")}


def _flowers102(place: Path, classes: Classes) -> Parts:
    numbers, parts = _mat(place / "imagelabels.mat", "labels").tolist(), _mat_content(place / "setid.mat")
    require_folder(place / "jpg")
    found: Parts = {}
    for part, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        if key not in parts:
            raise DataError(f"{place / 'setid.mat'} has no {key}; replace it")
        ids = np.atleast_1d(parts[key]).tolist()
        if max(ids, default=0) > len(numbers):
            raise DataError(f"{place / 'setid.mat'} names image {max(ids)}, but imagelabels.mat ends at {len(numbers)}")
        labels = [classes.label(str(numbers[image - 1]), place / "imagelabels.mat") for image in ids]
        paths = [f"jpg/image_{image:05d}.jpg" for image in ids]
        found[part] = file_images(place, paths, labels, place / "setid.mat")
    return found


def _food101(place: Path, classes: Classes) -> Parts:
    parts: Parts = {}
    for part in ("train", "test"):
        listed = place / "meta" / f"{part}.json"
        if not listed.is_file():
            raise DataError(f"{listed} is missing; extract the archive that it belongs to again")
        try:
            content = json.loads(listed.read_text(encoding="utf-8"))
            rows = [(name, image) for name, images in content.items() for image in images]
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{listed} is not a list of images by class ({error}); replace it") from error
        labels = [classes.label(name, listed) for name, _ in rows]
        parts[part] = file_images(place, [f"images/{image}.jpg" for _, image in rows], labels, listed)
    return parts


def _mnist(place: Path, classes: Classes) -> Parts:
    return {
        part: read_idx_pair(place / f"{prefix}-images-idx3-ubyte", place / f"{prefix}-labels-idx1-ubyte")
        for part, prefix in (("train", "train"), ("test", "t10k"))
    }


def _oxford_pet(place: Path, classes: Classes) -> Parts:
    parts: Parts = {}
    for part, name in (("train", "trainval"), ("test", "test")):
        listed = place / "annotations" / f"{name}.txt"
        paths, labels = [], []
        for line in lines(listed):
            image, *numbers = line.split()
            breed = image.rpartition("_")[0]
            label = classes.label(breed, listed)
            if len(numbers) != 3 or numbers[0] != str(label + 1):
                raise DataError(f"{listed}: {line!r} does not give {breed} its number {label + 1}; replace the file")
            paths.append(f"images/{image}.jpg")
            labels.append(label)
        parts[part] = file_images(place, paths, labels, listed)
    return parts


def _stanford_cars(place: Path, classes: Classes) -> Parts:
    meta = place / "devkit" / "cars_meta.mat"
    order = classes.labels_in_order(_mat(meta, "class_names").tolist(), meta)
    parts: Parts = {}
    for part, listed in (
        ("train", place / "devkit" / "cars_train_annos.mat"),
        ("test", place / "cars_test_annos_withlabels.mat"),
    ):
        annotations = _mat(listed, "annotations")
        if "class" not in (annotations.dtype.names or ()):
            raise DataError(f"{listed} holds no classes; it must be the file with labels")
        folder = f"cars_{part}"
        if (place / folder / folder).is_dir():  # the copy on Kaggle repeats the folder
            folder = f"{folder}/{folder}"
        require_folder(place / folder)
        numbers = [int(row["class"]) for row in annotations]
        if min(numbers) < 1 or max(numbers) > len(order):
            raise DataError(f"{listed}: expected classes from 1 to {len(order)}, got {min(numbers)} to {max(numbers)}")
        labels = [order[number - 1] for number in numbers]
        parts[part] = file_images(place, [f"{folder}/{row['fname']}" for row in annotations], labels, listed)
    return parts


def _sun397(place: Path, classes: Classes) -> Parts:
    listed = place / "ClassName.txt"
    if listed.is_file():
        classes.labels_of([line.strip("/") for line in lines(listed)], listed)
    return {"all": _by_folder(place, classes, "sun_")}


READERS: dict[str, Callable[[Path, Classes], Parts]] = {
    "Aircraft": _aircraft,
    "Caltech101": _caltech101,
    "CIFAR100": _cifar100,
    "DTD": _dtd,
    "EuroSAT": _eurosat,
    "Flowers102": _flowers102,
    "Food101": _food101,
    "MNIST": _mnist,
    "OxfordPet": _oxford_pet,
    "StanfordCars": _stanford_cars,
    "SUN397": _sun397,
    "CIFAR10": read_cifar10,
    "TinyImageNet": read_tiny_imagenet,
    "ImageNet100": read_imagenet,
    "ImageNet1000": read_imagenet,
    "ImageNetR": read_imagenet_r,
    "CUB200": read_cub200,
}
"""Dataset -> reader of (place, classes): ``train`` and ``test``, perhaps ``val``, or ``all``. Each raises a DataError that names
the file."""


def _by_folder(folder: Path, classes: Classes, prefix: str, ignored: tuple[str, ...] = ()) -> FileImages:
    """Every image whose folder, relative to ``folder``, is a class; in the order of the sorted paths."""
    paths, labels = [], []
    for path in images_below(folder, (".jpg", ".jpeg")):
        owner, _, name = path.rpartition("/")
        if owner.partition("/")[0] in ignored or not name.startswith(prefix):
            continue
        labels.append(classes.label(owner, folder))
        paths.append(path)
    found = file_images(folder, paths, labels, folder)
    require_all_classes(found, classes, folder)
    return found


def _mat(path: Path, key: str) -> Any:
    """One variable of a MATLAB file, as a vector."""
    content = _mat_content(path)
    if key not in content:
        raise DataError(f"{path} has no {key}; replace it")
    return np.atleast_1d(content[key]).ravel()


def _mat_content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing; extract the archive that it belongs to again")
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise DataError(
            f"{path}: MATLAB files are read with SciPy, which is not installed: pip install scipy"
        ) from error
    try:
        return loadmat(str(path), squeeze_me=True)
    except (MatReadError, ValueError, OSError, TypeError, NotImplementedError) as error:
        raise DataError(f"{path} is cut off or is not a MATLAB file ({error}); replace it") from error

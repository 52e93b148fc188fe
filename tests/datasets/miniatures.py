"""Small copies of the datasets with the file names, formats and metadata files of the real ones.

Every class is there, with a few images of one colour each that spells its label, so that tests can read from the pixels of an image
which class it was written for.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import classes

SIZES = {"train": 2, "val": 1, "test": 1}
"""Images per class of each part that a dataset brings."""
ALL = 5
"""Images per class of a dataset that comes without a split."""


def paint(label: int, number: int) -> Image.Image:
    """Red and green spell the label, with half of blue from 625 on; the rest of blue is the number of the image."""
    further, rest = divmod(label, 625)
    return Image.new("RGB", (8, 8), (10 * (rest % 25), 10 * (rest // 25), 128 * further + 15 * number % 120))


def spelt(image: Image.Image) -> int:
    """The label that :func:`paint` spelt."""
    red, green, blue = image.getpixel((4, 4))
    return round(red / 10) + 25 * round(green / 10) + 625 * (blue > 116)


def write(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(label, number).save(path, quality=95)


def rows(name: str, *parts: str) -> list[tuple[str, int, str, int]]:
    """(part, label, key, number), numbered through each class; classes come in turn, as in a shuffled list."""
    found = []
    start = 0
    for part in parts:
        for number in range(start, start + SIZES[part]):
            found += [(part, label, key, number) for label, key in enumerate(classes(name, "zscl").keys)]
        start += SIZES[part]
    return found


def aircraft(root: Path, place: str = "fgvc-aircraft-2013b/data") -> None:
    folder, lists = root / place, {"train": "", "val": "", "test": ""}
    for part, label, key, number in rows("Aircraft", *lists):
        image = f"{1000000 + 100 * label + number:07d}"
        write(folder / "images" / f"{image}.jpg", label, number)
        lists[part] += f"{image} {key}\n"
    for part, text in lists.items():
        (folder / f"images_variant_{part}.txt").write_text(text)
    (folder / "variants.txt").write_text("\n".join(classes("Aircraft", "zscl").keys) + "\n")


def caltech101(root: Path, place: str = "caltech101") -> None:
    folder = root / place / "101_ObjectCategories"
    for label, key in enumerate(classes("Caltech101", "zscl").keys):
        for number in range(ALL):
            write(folder / key / f"image_{number + 1:04d}.jpg", label, number)
    write(folder / "BACKGROUND_Google" / "image_0001.jpg", 0, 0)
    (folder / "BACKGROUND_Google" / "tmp").write_text("not an image")


def cifar100(root: Path, place: str = "cifar-100-python") -> None:
    folder = root / place
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        listed = rows("CIFAR100", part)
        pixels = [np.array(paint(label, number).resize((32, 32))).transpose(2, 0, 1) for _, label, _, number in listed]
        content = {
            "filenames": [f"{key}_{number:06d}.png" for _, _, key, number in listed],
            "fine_labels": [label for _, label, _, _ in listed],
            "coarse_labels": [label // 5 for _, label, _, _ in listed],
            "data": np.stack(pixels).reshape(len(listed), 3072),
        }
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    names = list(classes("CIFAR100", "zscl").keys)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))


def dtd(root: Path, place: str = "dtd/dtd") -> None:
    folder, lists = root / place, {"train": "", "val": "", "test": ""}
    for part, label, key, number in rows("DTD", *lists):
        image = f"{key}/{key}_{number:04d}.jpg"
        write(folder / "images" / image, label, number)
        lists[part] += f"{image}\n"
    (folder / "labels").mkdir()
    for part, text in lists.items():
        (folder / "labels" / f"{part}1.txt").write_text(text)


def eurosat(root: Path, place: str = "eurosat") -> None:
    for label, key in enumerate(classes("EuroSAT", "zscl").keys):
        for number in range(ALL):
            write(root / place / "2750" / key / f"{key}_{number + 1}.jpg", label, number)


def flowers102(root: Path, place: str = "flowers-102") -> None:
    folder, ids = root / place, {"train": [], "val": [], "test": []}
    labels = []
    for part, label, _, number in rows("Flowers102", *ids):
        labels.append(label + 1)
        ids[part].append(len(labels))
        write(folder / "jpg" / f"image_{len(labels):05d}.jpg", label, number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    numbers = {
        key: np.array([ids[part]], np.uint16) for key, part in zip(("trnid", "valid", "tstid"), ids, strict=True)
    }
    savemat(folder / "setid.mat", numbers)


def food101(root: Path, place: str = "food-101") -> None:
    folder = root / place
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for part, label, key, number in rows("Food101", *lists):
        image = f"{key}/{1000 * label + number}"
        write(folder / "images" / f"{image}.jpg", label, number)
        lists[part].setdefault(key, []).append(image)
    (folder / "meta").mkdir()
    for part, content in lists.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(content))


def mnist(root: Path, place: str = "MNIST/raw") -> None:
    folder = root / place
    folder.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        listed = rows("MNIST", part)
        values = np.array([label for _, label, _, _ in listed], np.uint8)
        pixels = np.repeat(
            10 * values, 28 * 28
        )  # grey of this value spells the same label in red, if green is not looked at
        header = struct.pack(">4B3I", 0, 0, 8, 3, len(values), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, len(values)) + values.tobytes()
        )


def oxford_pet(root: Path, place: str = "oxford-iiit-pet") -> None:
    folder, lists = root / place, {"train": "", "test": ""}
    for part, label, key, number in rows("OxfordPet", *lists):
        write(folder / "images" / f"{key}_{number + 1}.jpg", label, number)
        lists[part] += f"{key}_{number + 1} {label + 1} {1 if key[0].isupper() else 2} 1\n"
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text(lists["train"])
    (folder / "annotations" / "test.txt").write_text(lists["test"])


def stanford_cars(root: Path, place: str = "stanford_cars") -> None:
    folder = root / place
    names = classes("StanfordCars", "zscl").keys
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    (folder / "devkit").mkdir(parents=True)
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        listed = rows("StanfordCars", part)
        table = np.zeros((1, len(listed)), dtype=[(field, object) for field in fields])
        for place_in, (_, label, _, number) in enumerate(listed):
            file = f"{place_in + 1:05d}.jpg"
            write(folder / f"cars_{part}" / file, label, number)
            table[0, place_in] = (1, 1, 8, 8, label + 1, file)
        savemat(folder / path, {"annotations": table})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([list(names)], dtype=object)})


def sun397(root: Path, place: str = "SUN397") -> None:
    keys = classes("SUN397", "zscl").keys
    for label, key in enumerate(keys):
        for number in range(ALL):
            write(root / place / key / f"sun_{chr(97 + number) * 16}.jpg", label, number)
    (root / place / "ClassName.txt").write_text("".join(f"/{key}\n" for key in keys))


ORIGINALS: dict[str, Callable[..., None]] = {
    "Aircraft": aircraft,
    "Caltech101": caltech101,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers102": flowers102,
    "Food101": food101,
    "MNIST": mnist,
    "OxfordPet": oxford_pet,
    "StanfordCars": stanford_cars,
    "SUN397": sun397,
}
"""Dataset -> writer of (root, place) in torchvision's layout."""

COOP_PLACES = {
    "Aircraft": "fgvc_aircraft",
    "Caltech101": "caltech-101",
    "CIFAR100": "cifar100",
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "Flowers102": "oxford_flowers",
    "Food101": "food-101",
    "MNIST": "mnist",
    "OxfordPet": "oxford_pets",
    "StanfordCars": "stanford_cars",
    "SUN397": "sun397",
}
"""Where CoOp, and DIKI for MNIST and CIFAR100, want the same files."""


def write_coop(root: Path, name: str) -> Path:
    """The dataset as CoOp wants it; returns the split file (or the folder where CoOp uses the dataset's own split)."""
    spec, family = DATASETS[name], classes(name, "coop")
    place = root / COOP_PLACES[name]
    if spec.split_file is None:
        ORIGINALS[name](root, COOP_PLACES[name])
        return place
    content: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    start = {"train": 0, "val": 2, "test": 3}
    folder = "SUN397" if name == "SUN397" else spec.images[0]
    for part, first in start.items():
        for label, (key, spelt_name) in enumerate(zip(family.keys, family.names, strict=True)):
            for number in range(first, first + SIZES[part]):
                image = (
                    f"{key}/image_{number:04d}.jpg" if name != "StanfordCars" else f"cars_{part}/{label}_{number}.jpg"
                )
                write(place / folder / image, label, number)
                content[part].append([image, label, spelt_name.replace(" ", "_")])
    (place / spec.split_file).write_text(json.dumps(content))
    return place / spec.split_file


def write_image_folders(root: Path, name: str) -> Path:
    """``train/CLASS`` and ``test/CLASS``, with names of classes as file systems take them."""
    folder = root / DATASETS[name].copies[0]
    for part, label, key, number in rows(name, "train", "test"):
        write(folder / part / key.replace("/", "_").replace(" ", "_").lower() / f"{number}.png", label, number)
    return folder


def write_shards(root: Path, name: str) -> Path:
    """Two shards per split with ``nshards.txt``, and ``classnames.txt`` in an order of its own."""
    folder = root / DATASETS[name].copies[-1]
    names = classes(name, "zscl").names
    order = list(range(len(names)))[::-1]
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        (folder / part / "nshards.txt").write_text("2\n")
        listed = rows(name, part)
        for shard in range(2):
            with tarfile.open(folder / part / f"{shard}.tar", "w") as archive:
                for position, (_, label, _, number) in enumerate(listed[shard::2]):
                    buffer = io.BytesIO()
                    paint(label, number).save(buffer, "PNG")
                    for suffix, content in (("png", buffer.getvalue()), ("cls", str(order.index(label)).encode())):
                        entry = tarfile.TarInfo(f"s{position:07d}.{suffix}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
    (folder / "classnames.txt").write_text("".join(f"{names[label]}\n" for label in order))
    return folder


def cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    keys = list(classes("CIFAR10", "zscl").keys)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": keys, "num_vis": 3072}, protocol=2))
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        pixels = [np.array(paint(label, number).resize((32, 32))).transpose(2, 0, 1) for label in range(10)]
        content = {"batch_label": name, "labels": list(range(10)), "data": np.stack(pixels).reshape(10, 3072)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def tiny_imagenet(root: Path) -> None:
    folder, table = root / "tiny-imagenet-200", ""
    for label, key in enumerate(classes("TinyImageNet", "zscl").keys):
        for number in range(2):
            write(folder / "train" / key / "images" / f"{key}_{number}.JPEG", label, number)
        write(folder / "val" / "images" / f"val_{label}.JPEG", label, 2)
        table += f"val_{label}.JPEG\t{key}\t0\t0\t7\t7\n"
    (folder / "val" / "val_annotations.txt").write_text(table)
    (folder / "wnids.txt").write_text("\n".join(classes("TinyImageNet", "zscl").keys))


def imagenet(root: Path, count: int = 120) -> None:
    """The first ``count`` classes, of which ImageNet100 has the first hundred."""
    for label, key in enumerate(classes("ImageNet1000", "zscl").keys[:count]):
        for number in range(2):
            write(root / "imagenet" / "train" / key / f"{key}_{number}.JPEG", label, number)
        write(root / "imagenet" / "val" / key / f"ILSVRC2012_val_{label:08d}.JPEG", label, 2)


def imagenet_r(root: Path) -> None:
    for label, key in enumerate(classes("ImageNetR", "zscl").keys):
        for number in range(ALL):
            write(root / "imagenet-r" / key / f"art_{number}.jpg", label, number)


def cub200(root: Path) -> None:
    folder, lists = root / "CUB_200_2011", dict.fromkeys(("images", "image_class_labels", "train_test_split"), "")
    keys = classes("CUB200", "zscl").keys
    for position, (part, label, key, number) in enumerate(rows("CUB200", "train", "test"), 1):
        image = f"{key}/{key[4:]}_{number:04d}_{position}.jpg"
        write(folder / "images" / image, label, number)
        for name, value in zip(lists, (image, label + 1, int(part == "train")), strict=True):
            lists[name] += f"{position} {value}\n"
    for name, text in {**lists, "classes": "".join(f"{n} {key}\n" for n, key in enumerate(keys, 1))}.items():
        (folder / f"{name}.txt").write_text(text)


INCREMENTAL: dict[str, Callable[[Path], None]] = {
    "CIFAR10": cifar10,
    "TinyImageNet": tiny_imagenet,
    "ImageNet100": imagenet,
    "ImageNetR": imagenet_r,
    "CUB200": cub200,
}
"""Dataset of the class-incremental protocols -> writer of its own files."""

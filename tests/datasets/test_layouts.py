"""Every dataset in every layout that people have, in miniature: found, counted, labelled as it was written, fingerprinted."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
from miniatures import (
    ALL,
    COOP_PLACES,
    INCREMENTAL,
    ORIGINALS,
    SIZES,
    spelt,
    write_coop,
    write_image_folders,
    write_shards,
)

from cl_methods.datasets.find import Found, SplitOptions, find_dataset
from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import Family, classes


def find(root: Path, name: str, family: Family = "zscl", **options) -> Found:
    return find_dataset(DATASETS[name], root, SplitOptions(family, sizes="any", **options))


def check_labels(found: Found) -> None:
    """Every image of every split carries the label that its pixels spell, and no image is in two splits."""
    for source in (found.task.train, found.task.validation, found.task.test):
        for index, label in enumerate(source.labels.tolist()):
            image = source.image(index)
            assert image.mode == "RGB"
            assert (round(image.getpixel((4, 4))[0] / 10) if found.task.name == "MNIST" else spelt(image)) == label


def paths(source: ImageSource) -> set[str]:
    return set(source.paths)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_files(name, tmp_path):
    ORIGINALS[name](tmp_path)
    found = find(tmp_path, name)
    count, task, family = len(classes(name, "zscl")), found.task, classes(name, "zscl")
    assert (found.layout, task.class_names, task.templates) == ("original files", family.names, family.templates)
    if DATASETS[name].single:
        assert (len(task.train), len(task.test)) == (4 * ALL * count // 5, ALL * count // 5)
        assert not paths(task.train) & paths(task.test)
    else:
        assert (len(task.train), len(task.test)) == (SIZES["train"] * count, SIZES["test"] * count)
    assert len(task.validation) == (count if DATASETS[name].sizes["zscl"][1] else 0)
    check_labels(found)
    again = pickle.loads(pickle.dumps(task.train))
    assert again.fingerprint() == task.train.fingerprint()
    assert spelt(again.image(0)) == spelt(task.train.image(0))


@pytest.mark.parametrize("name", ORIGINALS)
def test_as_coop_lays_it_out(name, tmp_path):
    write_coop(tmp_path, name)
    found, count = find(tmp_path, name, "coop"), len(classes(name, "coop"))
    family = classes(name, "coop")
    assert (found.task.class_names, found.task.templates) == (family.names, family.templates)
    sizes = (len(found.task.train), len(found.task.validation), len(found.task.test))
    drawn = name in ("CIFAR100", "MNIST")  # a fifth of two images per class rounds to none
    assert sizes == (SIZES["train"] * count, 0 if drawn else count, count)
    check_labels(found)


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name != "SUN397"])
def test_coops_folders_hold_what_zscls_split_needs(name, tmp_path):
    ORIGINALS[name](tmp_path, COOP_PLACES[name])
    assert find(tmp_path, name).layout == "original files"


@pytest.mark.parametrize("name", INCREMENTAL)
def test_datasets_of_class_incremental_protocols(name, tmp_path):
    INCREMENTAL[name](tmp_path)
    found, count = find(tmp_path, name), len(classes(name, "zscl"))
    train = {"CIFAR10": 5, "ImageNetR": 4}.get(name, 2) * count
    assert (len(found.task.train), len(found.task.validation), len(found.task.test)) == (train, 0, count)
    assert found.task.class_names == classes(name, "zscl").names
    check_labels(found)
    few = find(tmp_path, name, "coop", shots=1)
    assert len(few.task.train) == len(found.task.train.labels.unique())


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("CIFAR10", "cifar-10-batches-py/data_batch_4", r"data_batch_4 is missing"),
        ("CIFAR10", "cifar-10-batches-py/batches.meta", r"batches\.meta is missing"),
        ("TinyImageNet", "tiny-imagenet-200/val/val_annotations.txt", r"val/val_annotations\.txt is missing"),
        (
            "TinyImageNet",
            "tiny-imagenet-200/val/images/val_7.JPEG",
            r"val_annotations\.txt lists .*val_7\.JPEG, which is not",
        ),
        ("TinyImageNet", "tiny-imagenet-200/train/n02124075", r"train/n02124075 is missing"),
        ("ImageNet100", "imagenet/val/n01440764", r"val/n01440764 is missing"),
        (
            "ImageNet100",
            "imagenet/val/n01440764/ILSVRC2012_val_00000000.JPEG",
            r"imagenet/val has no image of n01440764",
        ),
        ("ImageNetR", "imagenet-r/n02007558", r"imagenet-r/n02007558 is missing"),
        ("CUB200", "CUB_200_2011/train_test_split.txt", r"train_test_split\.txt is missing"),
        ("CUB200", "CUB_200_2011/images", r"images\.txt lists .*images/001.*, which is not there and \d+ more"),
    ],
)
def test_damaged_datasets_of_class_incremental_protocols(name, lost, message, tmp_path):
    INCREMENTAL[name](tmp_path)
    shutil.rmtree(tmp_path / lost) if (tmp_path / lost).is_dir() else (tmp_path / lost).unlink()
    with pytest.raises(DataError, match=message):
        find(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_class_labels", "1 1\n", r"image_class_labels\.txt and .*images\.txt do not number the same images"),
        ("train_test_split", "1\n", r"train_test_split\.txt: '1' is not a number and a value"),
        ("classes", "1 001.Penguin\n", r"classes\.txt: '001\.Penguin' is none of the 200 classes"),
    ],
)
def test_lists_of_cub_that_do_not_fit(name, text, message, tmp_path):
    INCREMENTAL["CUB200"](tmp_path)
    (tmp_path / "CUB_200_2011" / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        find(tmp_path, "CUB200")


def test_sun397_one_folder_deeper(tmp_path):
    ORIGINALS["SUN397"](tmp_path, "sun397/SUN397")
    assert len(find(tmp_path, "SUN397").task.train) == 4 * 397


@pytest.mark.parametrize("name", ORIGINALS)
def test_image_folders(name, tmp_path):
    write_image_folders(tmp_path, name)
    found, count = find(tmp_path, name), len(classes(name, "zscl"))
    assert found.layout == "image folders"
    assert (len(found.task.train), len(found.task.test)) == (SIZES["train"] * count, SIZES["test"] * count)
    if name != "MNIST":
        check_labels(found)


@pytest.mark.parametrize("name", ORIGINALS)
def test_shards(name, tmp_path):
    write_shards(tmp_path, name)
    found, count = find(tmp_path, name), len(classes(name, "zscl"))
    assert found.layout == "WebDataset"
    assert (len(found.task.train), len(found.task.test)) == (SIZES["train"] * count, SIZES["test"] * count)
    if name != "MNIST":
        check_labels(found)
    assert pickle.loads(pickle.dumps(found.task.test)).fingerprint() == found.task.test.fingerprint()


@pytest.mark.parametrize("name", ["Caltech101", "EuroSAT"])
def test_one_folder_per_class_is_split_like_the_original_files(name, tmp_path):
    """The rule looks at the sorted list, so a copy of the same folders under another name gives the same images."""
    ORIGINALS[name](tmp_path / "original")
    first = find(tmp_path / "original", name)
    (tmp_path / "copy").mkdir()
    copy = (first.place / DATASETS[name].images[0]).rename(tmp_path / "copy" / DATASETS[name].copies[0])
    shutil.rmtree(copy / "BACKGROUND_Google", ignore_errors=True)
    second = find(tmp_path / "copy", name)
    assert second.layout == "image folders"
    assert (second.task.train.fingerprint(), second.fingerprint()) == (
        first.task.train.fingerprint(),
        first.fingerprint(),
    )


@pytest.mark.parametrize("name", ["Aircraft", "Caltech101", "MNIST"])
@pytest.mark.parametrize("family", ["zscl", "coop"])
def test_few_shots(name, family, tmp_path):
    (ORIGINALS[name] if family == "zscl" else write_coop)(*((tmp_path,) if family == "zscl" else (tmp_path, name)))
    full, few = find(tmp_path, name, family), find(tmp_path, name, family, shots=1)
    counts = Counter(few.task.train.labels.tolist())
    assert set(counts.values()) == {1}
    assert set(counts) == set(full.task.train.labels.tolist())
    assert few.task.test.fingerprint() == full.task.test.fingerprint()
    assert find(tmp_path, name, family, shots=1).fingerprint() == few.fingerprint()
    assert find(tmp_path, name, family, shots=1, seed=1).fingerprint() != few.fingerprint()
    if name != "MNIST":
        check_labels(few)


def test_validation_images_are_taken_from_training_only_where_there_are_none(tmp_path):
    ORIGINALS["OxfordPet"](tmp_path)
    ORIGINALS["DTD"](tmp_path)
    pets, textures = (find(tmp_path, name, validation_fraction=0.5) for name in ("OxfordPet", "DTD"))
    assert (len(pets.task.train), len(pets.task.validation)) == (37, 37)
    assert not paths(pets.task.train) & paths(pets.task.validation)
    assert (len(textures.task.train), len(textures.task.validation)) == (94, 47)
    assert len(find(tmp_path, "OxfordPet").task.validation) == 0


def test_families_have_fingerprints_of_their_own(tmp_path):
    ORIGINALS["DTD"](tmp_path, "dtd")
    write_coop(tmp_path, "DTD")
    assert find(tmp_path, "DTD").fingerprint() != find(tmp_path, "DTD", "coop").fingerprint()

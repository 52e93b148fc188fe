"""Class names, prompts, published sizes and the rules of the splits."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.splits import coop_shots, first_shots, set_aside, zscl_split
from cl_methods.datasets.texts import FILES, classes

COUNTS = {
    "Aircraft": (100, 2),
    "Caltech101": (101, 34),
    "CIFAR100": (100, 18),
    "DTD": (47, 8),
    "EuroSAT": (10, 3),
    "Flowers102": (102, 1),
    "Food101": (101, 1),
    "MNIST": (10, 1),
    "OxfordPet": (37, 1),
    "StanfordCars": (196, 9),
    "SUN397": (397, 2),
}
"""Classes and prompts of the public runs of ZSCL."""

INCREMENTAL = {
    "CIFAR10": 10,
    "TinyImageNet": 200,
    "ImageNet100": 100,
    "ImageNet1000": 1000,
    "ImageNetR": 200,
    "CUB200": 200,
}
"""Classes of the datasets of the class-incremental protocols."""

MNIST_TRAINING = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
"""Training images of every digit."""


def test_the_table_and_the_files_are_of_the_same_datasets():
    files = {entry.name.removesuffix(".yaml") for entry in FILES.iterdir()}
    assert set(DATASETS) == files == {*COUNTS, *INCREMENTAL}


@pytest.mark.parametrize(("name", "count"), INCREMENTAL.items())
def test_classes_of_class_incremental_protocols(name, count):
    family = classes(name, "zscl")
    assert len(family) == len(set(family.keys)) == count
    assert family.labels_of(family.keys, "keys") == list(range(count))
    assert family.names == classes(name, "coop").names
    assert classes("ImageNet1000", "zscl").keys[:100] == classes("ImageNet100", "zscl").keys


@pytest.mark.parametrize("name", COUNTS)
def test_classes_and_prompts(name):
    zscl, coop = classes(name, "zscl"), classes(name, "coop")
    assert (len(zscl), len(zscl.templates)) == COUNTS[name]
    assert len(coop) == len(zscl) - (name == "Caltech101")
    assert len(coop.templates) == 1
    for family in (zscl, coop):
        assert len(set(family.keys)) == len(set(family.names)) == len(family)
        assert all(template.count("{}") == 1 for template in family.templates)
        assert not any(" " * 2 in each or "_" in each or each != each.strip() for each in family.names)
        assert (
            family.labels_of(family.names, "names") == family.labels_of(family.keys, "keys") == list(range(len(family)))
        )


def test_the_total_is_that_of_the_papers():
    assert sum(len(classes(name, "zscl")) for name in COUNTS) == 1201
    assert sum(len(classes(name, "coop")) for name in COUNTS) == 1200


@pytest.mark.parametrize(
    ("name", "key", "zscl", "coop"),
    [
        ("Caltech101", "Faces", "off-center face", "face"),
        ("Caltech101", "airplanes", "airplane", "airplane"),
        ("EuroSAT", "SeaLake", "lake or sea", "Sea or Lake"),
        ("OxfordPet", "american_bulldog", "American Bulldog", "american bulldog"),
        ("StanfordCars", "Audi TT RS Coupe 2012", "Audi TT RS Coupe 2012", "2012 Audi TT RS Coupe"),
        ("SUN397", "a/apartment_building/outdoor", "apartment building/outdoor", "outdoor apartment building"),
        ("MNIST", "7", "7 - seven", "7 - seven"),
        ("Aircraft", "F-16A/B", "F-16A/B", "F-16A/B"),
    ],
)
def test_names_in_both_families(name, key, zscl, coop):
    label = classes(name, "zscl").keys.index(key)
    assert classes(name, "zscl").names[label] == zscl
    family = classes(name, "coop")
    assert family.names[family.keys.index(key)] == coop


def test_names_are_recognised_in_other_spellings_and_nothing_else_is():
    family = classes("Aircraft", "zscl")
    assert family.labels_of(["f-16a_b", "Boeing_717"], "here", whole=False) == [
        family.keys.index("F-16A/B"),
        family.keys.index("Boeing 717"),
    ]
    with pytest.raises(DataError, match="here: 'Concorde' is none of the 100 classes"):
        family.labels_of(["Concorde"], "here", whole=False)
    with pytest.raises(
        DataError, match="there: found 1 of 100 classes; missing are 707-320, 727-200, 737-200 and 96 more"
    ):
        family.labels_of(["A310"], "there")
    shuffled = list(family.names[::-1])
    shuffled[3] = "a name of its own"
    assert family.labels_in_order(shuffled, "list") == list(range(100))[::-1]


@pytest.mark.parametrize(("name", "images"), [("Caltech101", 8677), ("EuroSAT", 27000), ("SUN397", 108754)])
def test_the_seeded_split_has_the_published_sizes(name, images):
    training, testing = zscl_split(images)
    assert (len(training), 0, len(testing)) == DATASETS[name].sizes["zscl"]
    assert torch.equal(torch.cat([training, testing]).sort().values, torch.arange(images))
    generator = torch.Generator().manual_seed(42)
    lengths = [int(0.8 * images), images - int(0.8 * images)]
    published = torch.utils.data.random_split(range(images), lengths, generator=generator)  # type: ignore[arg-type]
    assert [list(part.indices) for part in published] == [training.tolist(), testing.tolist()]


def test_published_sizes_add_up():
    sizes = {name: DATASETS[name].sizes for name in COUNTS}
    assert sum(each["zscl"][2] for each in sizes.values()) == 97_209
    whole = {"Aircraft": 10_000, "CIFAR100": 60_000, "DTD": 5_640, "EuroSAT": 27_000, "Flowers102": 8_189}
    whole |= {"Food101": 101_000, "MNIST": 70_000, "OxfordPet": 7_349, "StanfordCars": 16_185}
    for name, images in whole.items():
        families = sizes[name].values()
        assert {sum(each) for each in families} == {images}, name
    assert sum(sizes["Caltech101"]["zscl"]) - sum(sizes["Caltech101"]["coop"]) == 435  # the images of Faces_easy
    assert sum(sizes["SUN397"]["coop"]) == 397 * 100


def test_dikis_validation_images_have_the_published_sizes():
    digits = torch.cat([torch.full((count,), digit) for digit, count in enumerate(MNIST_TRAINING)])
    fine = torch.arange(50_000) % 100
    for name, labels in (("MNIST", digits), ("CIFAR100", fine)):
        stays, aside = set_aside(labels, 0.2, 0, name, "DIKI")
        assert (len(stays), len(aside)) == DATASETS[name].sizes["coop"][:2]
        assert torch.equal(torch.cat([stays, aside]).sort().values, torch.arange(len(labels)))
        assert torch.equal(set_aside(labels, 0.2, 0, name, "DIKI")[1], aside)
        assert not torch.equal(set_aside(labels, 0.2, 1, name, "DIKI")[1], aside)
    assert Counter(fine[aside].tolist()) == dict.fromkeys(range(100), 100)


def test_an_image_of_every_class_stays():
    stays, aside = set_aside(torch.tensor([0, 1, 1, 1]), 0.9, 0)
    assert (stays.numel(), aside.numel()) == (2, 2)
    assert set_aside(torch.empty(0, dtype=torch.int64), 0.5, 0)[1].tolist() == []


@pytest.mark.parametrize("shots", [5, 16])
def test_shots_of_both_definitions(shots):
    labels = torch.randint(0, 20, (900,), generator=torch.Generator().manual_seed(1))
    labels[labels == 7] = 6
    labels[:3] = 7  # a class with fewer images than shots gives all
    first = first_shots(labels, shots, 0, "name")
    coop = coop_shots(labels, shots, random.Random(0))
    for chosen in (first, coop):
        assert len(set(chosen.tolist())) == len(chosen)
        counts = Counter(labels[chosen].tolist())
        assert counts == {label: 3 if label == 7 else shots for label in range(20)}
    assert torch.equal(first_shots(labels, shots, 0, "name"), first)
    assert not torch.equal(first_shots(labels, shots, 1, "name"), first)
    smaller = set(first_shots(labels, shots - 1, 0, "name").tolist())
    assert smaller < set(first.tolist())  # the first of one pass


def test_coops_draw_is_that_of_its_generator():
    """Class by class in order of appearance, training images first and validation images from the same stream."""
    labels = torch.tensor([2, 0, 2, 0, 2, 0, 2, 0])
    generator, published = random.Random(3), random.Random(3)
    train = coop_shots(labels, 2, generator)
    validation = coop_shots(labels, 1, generator)
    expected = [*published.sample([0, 2, 4, 6], 2), *published.sample([1, 3, 5, 7], 2)]
    assert train.tolist() == expected
    assert validation.tolist() == [*published.sample([0, 2, 4, 6], 1), *published.sample([1, 3, 5, 7], 1)]

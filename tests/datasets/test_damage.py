"""Everything that can be wrong with a dataset on disk: a sentence that names the file, and never a smaller test set."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from miniatures import ORIGINALS, write, write_coop, write_image_folders, write_shards
from scipy.io import loadmat, savemat

from cl_methods.datasets.find import DataNotFoundError, SplitOptions, find_dataset
from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def compress(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


class Harmful:
    def __reduce__(self):
        return os.system, ("true",)


AIRCRAFT, DTD, MNIST, CARS = "fgvc-aircraft-2013b/data", "dtd/dtd", "MNIST/raw", "stanford_cars"
CIFAR, FLOWERS, FOOD, PETS = "cifar-100-python", "flowers-102", "food-101", "oxford-iiit-pet"

ORIGINAL_FILES: dict[str, tuple[str, Damage, str]] = {
    "a split file is missing": (
        "Aircraft",
        lambda root: (root / AIRCRAFT / "images_variant_test.txt").unlink(),
        r"images_variant_test\.txt is missing",
    ),
    "the list of classes is missing": (
        "Aircraft",
        lambda root: (root / AIRCRAFT / "variants.txt").unlink(),
        r"variants\.txt is missing",
    ),
    "the list of classes is short": (
        "Aircraft",
        lambda root: replace(root / AIRCRAFT / "variants.txt", "A310\n", ""),
        r"variants\.txt: found 99 of 100 classes; missing are A310",
    ),
    "a class that there is not": (
        "Aircraft",
        lambda root: replace(root / AIRCRAFT / "images_variant_train.txt", "707-320", "Concorde"),
        r"images_variant_train\.txt: 'Concorde' is none of the 100 classes",
    ),
    "images are missing": (
        "Aircraft",
        lambda root: [path.unlink() for path in sorted((root / AIRCRAFT / "images").iterdir())[:5]],
        r"images_variant_train\.txt lists .*/images/1000000\.jpg, which is not there and \d more of the 200 images",
    ),
    "all images are missing": (
        "Aircraft",
        lambda root: shutil.rmtree(root / AIRCRAFT / "images"),
        r"data/images is missing; extract the archive",
    ),
    "a class has no folder": (
        "Caltech101",
        lambda root: shutil.rmtree(root / "caltech101" / "101_ObjectCategories" / "ibis"),
        r"101_ObjectCategories has no image of ibis",
    ),
    "a class is empty": (
        "EuroSAT",
        lambda root: [path.unlink() for path in (root / "eurosat" / "2750" / "River").iterdir()],
        r"2750 has no image of River",
    ),
    "a folder is no class": (
        "Caltech101",
        lambda root: write(root / "caltech101" / "101_ObjectCategories" / "unicorn" / "image_0001.jpg", 0, 0),
        r"101_ObjectCategories: 'unicorn' is none of the 101 classes",
    ),
    "a pickle is cut off": ("CIFAR100", lambda root: cut(root / CIFAR / "test"), r"cifar-100-python/test is cut off"),
    "a pickle is missing": (
        "CIFAR100",
        lambda root: (root / CIFAR / "train").unlink(),
        r"cifar-100-python/train is missing",
    ),
    "a pickle of CIFAR10": (
        "CIFAR100",
        lambda root: (root / CIFAR / "train").write_bytes(pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]})),
        r"train has no fine_labels beside its data .* it belongs to another dataset",
    ),
    "a pickle of other numbers": (
        "CIFAR100",
        lambda root: (root / CIFAR / "train").write_bytes(
            pickle.dumps({"data": np.zeros((2, 99)), "fine_labels": [0]})
        ),
        r"train: expected bytes \(1, 3072\) for its labels, got float64 \(2, 99\)",
    ),
    "a label beyond the last": (
        "CIFAR100",
        lambda root: (root / CIFAR / "test").write_bytes(
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [100]})
        ),
        r"test: expected labels from 0 to 99, got 100 to 100",
    ),
    "a pickle that runs code": (
        "CIFAR100",
        lambda root: (root / CIFAR / "meta").write_bytes(pickle.dumps(Harmful())),
        r"meta is cut off or is not one of CIFAR's pickles \(it asks for posix\.system",
    ),
    "other class names": (
        "CIFAR100",
        lambda root: (root / CIFAR / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple"]})),
        r"meta: fine_label_names are not the 100 classes",
    ),
    "a list that is no text": (
        "DTD",
        lambda root: (root / DTD / "labels" / "test1.txt").write_bytes(b"\xff\xfe\x00"),
        r"labels/test1\.txt is not a text file",
    ),
    "a list that is empty": (
        "DTD",
        lambda root: (root / DTD / "labels" / "val1.txt").write_text("\n"),
        r"labels/val1\.txt is empty",
    ),
    "another partition": (
        "DTD",
        lambda root: (root / DTD / "labels" / "train1.txt").rename(root / DTD / "labels" / "train2.txt"),
        r"labels/train1\.txt is missing",
    ),
    "no split": ("Flowers102", lambda root: (root / FLOWERS / "setid.mat").unlink(), r"setid\.mat is missing"),
    "a MATLAB file is cut off": (
        "Flowers102",
        lambda root: cut(root / FLOWERS / "imagelabels.mat"),
        r"imagelabels\.mat is cut off or is not a MATLAB file",
    ),
    "a split beyond the labels": (
        "Flowers102",
        lambda root: savemat(root / FLOWERS / "imagelabels.mat", {"labels": [1, 2, 3]}),
        r"setid\.mat names image \d+, but imagelabels\.mat ends at 3",
    ),
    "a split without a part": (
        "Flowers102",
        lambda root: savemat(root / FLOWERS / "setid.mat", {"trnid": [1], "valid": [2]}),
        r"setid\.mat has no tstid",
    ),
    "a JSON list is cut off": (
        "Food101",
        lambda root: cut(root / FOOD / "meta" / "test.json"),
        r"meta/test\.json is not a list of images by class",
    ),
    "an image is missing": (
        "Food101",
        lambda root: (root / FOOD / "images" / "waffles" / "100002.jpg").unlink(),
        r"meta/test\.json lists .*waffles/100002\.jpg, which is not there; extract",
    ),
    "an idx file is cut off": (
        "MNIST",
        lambda root: cut(root / MNIST / "t10k-images-idx3-ubyte"),
        r"t10k-images-idx3-ubyte has [\d,]+ bytes where its header says 7,856",
    ),
    "a compressed idx file is cut off": (
        "MNIST",
        lambda root: (
            compress(root / MNIST / "train-images-idx3-ubyte"),
            cut(root / MNIST / "train-images-idx3-ubyte.gz"),
        ),
        r"train-images-idx3-ubyte\.gz is cut off or damaged",
    ),
    "not an idx file": (
        "MNIST",
        lambda root: (root / MNIST / "train-labels-idx1-ubyte").write_text("labels"),
        r"train-labels-idx1-ubyte is not an idx file of bytes in 1 dimension",
    ),
    "images without labels": (
        "MNIST",
        lambda root: (root / MNIST / "t10k-labels-idx1-ubyte").unlink(),
        r"t10k-labels-idx1-ubyte is missing \(with or without \.gz\)",
    ),
    "labels of the other part": (
        "MNIST",
        lambda root: shutil.copy(root / MNIST / "train-labels-idx1-ubyte", root / MNIST / "t10k-labels-idx1-ubyte"),
        r"t10k-images-idx3-ubyte holds 10 images but .*t10k-labels-idx1-ubyte 20 labels",
    ),
    "no test list": (
        "OxfordPet",
        lambda root: (root / PETS / "annotations" / "test.txt").unlink(),
        r"annotations/test\.txt is missing",
    ),
    "a breed with another number": (
        "OxfordPet",
        lambda root: replace(root / PETS / "annotations" / "trainval.txt", "beagle_1 5", "beagle_1 6"),
        r"trainval\.txt: 'beagle_1 6 2 1' does not give beagle its number 5",
    ),
    "no names": (
        "StanfordCars",
        lambda root: (root / CARS / "devkit" / "cars_meta.mat").unlink(),
        r"devkit/cars_meta\.mat is missing",
    ),
    "test annotations without labels": (
        "StanfordCars",
        lambda root: savemat(
            root / CARS / "cars_test_annos_withlabels.mat",
            {"annotations": np.array([(1, "00001.jpg")], dtype=[("bbox_x1", object), ("fname", object)])},
        ),
        r"cars_test_annos_withlabels\.mat holds no classes; it must be the file with labels",
    ),
    "a class beyond the last": (
        "StanfordCars",
        lambda root: savemat(
            root / CARS / "devkit" / "cars_train_annos.mat",
            {
                "annotations": np.array(
                    [(197, "00001.jpg"), (1, "00002.jpg")], dtype=[("class", object), ("fname", object)]
                )
            },
        ),
        r"cars_train_annos\.mat: expected classes from 1 to 196, got 1 to 197",
    ),
    "names of other cars": (
        "StanfordCars",
        lambda root: savemat(
            root / CARS / "devkit" / "cars_meta.mat",
            {"class_names": np.array([[f"car {number}" for number in range(196)]], dtype=object)},
        ),
        r"cars_meta\.mat: these are not the 196 classes of this dataset; one is 'car 0'",
    ),
    "no test images": (
        "StanfordCars",
        lambda root: shutil.rmtree(root / CARS / "cars_test"),
        r"stanford_cars/cars_test is missing",
    ),
    "names of other scenes": (
        "SUN397",
        lambda root: replace(root / "SUN397" / "ClassName.txt", "/a/abbey\n", "/a/abattoir\n"),
        r"ClassName\.txt: 'a/abattoir' is none of the 397 classes",
    ),
    "a scene is missing": (
        "SUN397",
        lambda root: (
            shutil.rmtree(root / "SUN397" / "z" / "nothing", ignore_errors=True)
            or shutil.rmtree(root / "SUN397" / "w" / "wave")
        ),
        r"SUN397 has no image of w/wave",
    ),
}


@pytest.mark.parametrize("case", ORIGINAL_FILES)
def test_damaged_original_files(case, tmp_path):
    name, damage, message = ORIGINAL_FILES[case]
    ORIGINALS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        find_dataset(DATASETS[name], tmp_path, SplitOptions(sizes="any"))


SPLIT_FILES: dict[str, tuple[Damage, str]] = {
    "cut off": (cut, r"split_zhou_EuroSAT\.json is cut off or is not a split file"),
    "without validation": (
        lambda path: edit(path, lambda content: content.pop("val")),
        r"split_zhou_EuroSAT\.json is cut off or is not a split file of CoOp with train, val and test \(KeyError\('val'\)",
    ),
    "of another dataset": (
        lambda path: edit(
            path, lambda content: [row.__setitem__(2, f"b{row[1]}") for rows in content.values() for row in rows]
        ),
        r"these are not the 10 classes of this dataset; one is 'b0'",
    ),
    "of too few classes": (
        lambda path: edit(
            path,
            lambda content: content.update(
                {part: [row for row in rows if row[1] < 9] for part, rows in content.items()}
            ),
        ),
        r"split_zhou_EuroSAT\.json: expected 10 classes, found 9",
    ),
    "with an image in two parts": (
        lambda path: edit(path, lambda content: content["test"].append(content["train"][0])),
        r"AnnualCrop/image_0000\.jpg is in train and in test",
    ),
    "with two names for a label": (
        lambda path: edit(path, lambda content: content["test"][0].__setitem__(2, "Forest")),
        r"label 0 is called 'Annual_Crop_Land' and 'Forest'",
    ),
    "without the images": (
        lambda path: shutil.rmtree(path.parent / "2750"),
        r"its images are not: .*eurosat/2750 is missing",
    ),
    "without one image": (
        lambda path: (path.parent / "2750" / "River" / "image_0003.jpg").unlink(),
        r"split_zhou_EuroSAT\.json lists .*River/image_0003\.jpg, which is not there",
    ),
    "missing": (
        lambda path: path.unlink(),
        r"split_zhou_EuroSAT\.json is missing, CoOp's list of the splits of EuroSAT",
    ),
}


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_damaged_split_files(case, tmp_path):
    damage, message = SPLIT_FILES[case]
    damage(write_coop(tmp_path, "EuroSAT"))
    with pytest.raises(DataError, match=message):
        find_dataset(DATASETS["EuroSAT"], tmp_path, SplitOptions("coop", sizes="any"))


FOLDERS: dict[str, tuple[Damage, str]] = {
    "no test": (lambda folder: shutil.rmtree(folder / "test"), r"DTD has train but no test: .*DTD/test is missing"),
    "a folder is no class": (
        lambda folder: (folder / "test" / "shiny").mkdir(),
        r"DTD/test: 'shiny' is none of the 47 classes",
    ),
    "a class is missing": (
        lambda folder: shutil.rmtree(folder / "test" / "woven"),
        r"DTD/test: found 46 of 47 classes; missing are woven",
    ),
    "a class is empty": (
        lambda folder: [path.unlink() for path in (folder / "test" / "woven").iterdir()],
        r"DTD/test has no image of woven",
    ),
    "a class comes twice": (
        lambda folder: (folder / "train" / "Polka Dotted").mkdir(),
        r"'polka-dotted' and 'Polka Dotted' are the same class",
    ),
    "no split": (
        lambda folder: (
            [path.rename(folder / path.name) for path in (folder / "train").iterdir()]
            and [shutil.rmtree(folder / part) for part in ("train", "test")]
        ),
        r"DTD has one folder per class but no split; the family zscl needs the published split of DTD",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_image_folders(case, tmp_path):
    damage, message = FOLDERS[case]
    damage(write_image_folders(tmp_path, "DTD"))
    with pytest.raises(DataError, match=message):
        find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any"))


def rewrite(shard: Path, change: Callable[[tarfile.TarInfo], bool]) -> None:
    """The same archive with only the members for which ``change`` is true."""
    with tarfile.open(shard) as old, tarfile.open(shard.with_suffix(".new"), "w") as new:
        for entry in old:
            if change(entry):
                new.addfile(entry, old.extractfile(entry))
    shard.with_suffix(".new").rename(shard)


SHARDS: dict[str, tuple[Damage, str]] = {
    "cut off": (lambda folder: cut(folder / "test" / "1.tar"), r"test/1\.tar is cut off"),
    "cut off in the last image": (
        lambda folder: (folder / "test" / "1.tar").write_bytes((folder / "test" / "1.tar").read_bytes()[:600]),
        r"test/1\.tar is cut off",
    ),
    "a shard is missing": (
        lambda folder: (folder / "train" / "1.tar").unlink(),
        r"train/nshards\.txt says 2 shards, found 1",
    ),
    "compressed": (
        lambda folder: compress(folder / "train" / "0.tar"),
        r"train/0\.tar\.gz is cut off, compressed or not",
    ),
    "no test": (lambda folder: shutil.rmtree(folder / "test"), r"has train but no shards in .*/test"),
    "an image without its class": (
        lambda folder: rewrite(folder / "test" / "0.tar", lambda entry: entry.name != "s0000003.cls"),
        r"test/0\.tar: sample s0000003 lacks its class",
    ),
    "a class without its image": (
        lambda folder: rewrite(folder / "test" / "0.tar", lambda entry: entry.name != "s0000003.png"),
        r"test/0\.tar: sample s0000003 lacks its image",
    ),
    "an empty shard": (
        lambda folder: rewrite(folder / "test" / "0.tar", lambda entry: False),
        r"test/0\.tar holds no sample",
    ),
    "other class names": (
        lambda folder: (folder / "classnames.txt").write_text("\n".join(f"class {number}" for number in range(47))),
        r"classnames\.txt: these are not the 47 classes",
    ),
    "fewer class names": (
        lambda folder: replace(folder / "classnames.txt", "woven\n", ""),
        r"classnames\.txt: expected 47 classes, found 46",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_shards(case, tmp_path):
    damage, message = SHARDS[case]
    damage(write_shards(tmp_path, "DTD"))
    with pytest.raises(DataError, match=message):
        find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any"))


def test_an_unreadable_image_is_named_when_its_turn_comes(tmp_path):
    ORIGINALS["DTD"](tmp_path)
    found = find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any")).task.test
    damaged = found.root / found.paths[7]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"{damaged} is not a readable image"):
        found.image(7)
    damaged.unlink()
    with pytest.raises(DataError, match=rf"{damaged} is gone; restore it"):
        found.image(7)


def test_an_unreadable_member_is_named_when_its_turn_comes(tmp_path):
    folder = write_shards(tmp_path, "DTD")
    found = find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any")).task.test
    member = found.members[7]
    with (folder / member.archive).open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * member.size)
    with pytest.raises(DataError, match=rf"{member.name} in {folder / member.archive} is not a readable image"):
        found.image(7)


def test_another_size_than_the_published_one_is_refused(tmp_path):
    ORIGINALS["DTD"](tmp_path)
    with pytest.raises(
        DataError, match=r"94 / 47 / 47 images of DTD .* where the published split zscl has 1,880 / 1,880 / 1,880"
    ):
        find_dataset(DATASETS["DTD"], tmp_path, SplitOptions())


def test_a_split_of_one_family_is_not_taken_for_the_other(tmp_path):
    """Image folders with the sizes of CoOp's split of the pets, asked for as ZSCL's."""
    sizes = dict(zip(("train", "val", "test"), DATASETS["OxfordPet"].sizes["coop"], strict=True))
    for part, size in sizes.items():
        for label, key in enumerate(DATASETS["OxfordPet"].classes("zscl").keys):
            folder = tmp_path / "OxfordPet" / part / key
            folder.mkdir(parents=True)
            for number in range(size * label // 37, size * (label + 1) // 37):
                (folder / f"{number}.jpg").touch()
    with pytest.raises(
        DataError, match=r"2,944 / 736 / 3,669 .* has 3,680 / 0 / 3,669; these are the sizes of the family coop"
    ):
        find_dataset(DATASETS["OxfordPet"], tmp_path, SplitOptions())
    assert len(find_dataset(DATASETS["OxfordPet"], tmp_path, SplitOptions("coop")).task.validation) == 736


@pytest.mark.parametrize("family", ["zscl", "coop"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_what_is_missing_and_where_to_put_it(name, family, tmp_path):
    spec = DATASETS[name]
    with pytest.raises(DataNotFoundError) as caught:
        find_dataset(spec, tmp_path, SplitOptions(family))
    text = str(caught.value)
    wanted = spec.coop_place if family == "coop" and spec.split_file else spec.places[0]
    assert f"{name} is not in {tmp_path}. Put it into {tmp_path / wanted}, with " in text
    assert spec.source.split()[0] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, r"data\.shots: expected a number >= 1, got 0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction: expected a share from 0 to below 1, got 1\.0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(DataError, match=message):
        SplitOptions(**options)


def test_the_root_must_be_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*nowhere is not a directory"):
        find_dataset(DATASETS["DTD"], tmp_path / "nowhere", SplitOptions())


def test_mat_files_of_miniatures_read_like_the_real_ones(tmp_path):
    """The miniature's annotations have the structure that SciPy makes of the real file."""
    ORIGINALS["StanfordCars"](tmp_path)
    table = loadmat(tmp_path / CARS / "devkit" / "cars_train_annos.mat", squeeze_me=True)["annotations"]
    assert set(table.dtype.names) == {"bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"}
    assert (int(table[0]["class"]), str(table[0]["fname"])) == (1, "00001.jpg")


def test_how_many_kinds_of_damage_are_tried():
    """Every case of every table of this folder is a test of its own; here they are counted, and none stands in a table twice."""
    import test_image_cache
    import test_reference_data
    import test_teacher_features

    tables = {
        "original files": ORIGINAL_FILES,
        "split files": SPLIT_FILES,
        "image folders": FOLDERS,
        "shards": SHARDS,
        "image cache": test_image_cache.DAMAGE,
        "features": test_teacher_features.FEATURE_DAMAGE,
        "reference images": test_reference_data.IMAGES,
        "captions": test_reference_data.TEXTS,
    }
    counted = {name: len(table) for name, table in tables.items()}
    print(counted, sum(counted.values()))
    assert sum(counted.values()) >= 100
    for name in ("original files", "split files", "image folders", "shards", "reference images", "captions"):
        messages = [case[-1] for case in tables[name].values()]
        assert all(message and message.strip() for message in messages), f"{name}: a case that expects no sentence"

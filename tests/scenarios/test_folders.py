"""Scenario ``folders``: layouts, splits, names, prompts, and a sentence for everything that can be wrong with a directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_methods.cli import main
from cl_methods.datasets.images import DataError
from cl_methods.scenarios import ScenarioOptions, load
from cl_methods.scenarios.folders import load_scenario


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLK_CACHE", str(tmp_path_factory.mktemp("cache")))


def draw(path: Path, color: str, seed: int) -> None:
    """A noisy 40 x 30 image of one colour, in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "yellow": (230, 220, 40)}[color]
    noise = np.random.default_rng(seed).integers(-20, 20, (30, 40, 3))
    Image.fromarray((np.array(base) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two tasks: ``warm`` brings train and test (JPEG, one folder deeper), ``cold`` is one level to be split (PNG)."""
    folder = tmp_path / "images"
    for name in ("red", "yellow"):
        for number in range(6):
            draw(folder / "warm" / "train" / name / "deeper" / f"{number}.jpg", name, number)
        for number in range(3):
            draw(folder / "warm" / "test" / name / f"{number}.JPEG", name, 100 + number)
    for name in ("blue", "green"):
        for number in range(10):
            draw(folder / "cold" / name / f"{number}.png", name, number)
    return folder


def files_of(source) -> set[str]:
    return set(source.paths)


def test_both_layouts(root):
    (root / "warm" / "train" / "red" / "notes.txt").write_text("not an image")
    (root / "warm" / "train" / "red" / ".hidden.jpg").write_text("not an image either")
    scenario = load_scenario(root)
    assert [task.name for task in scenario.tasks] == ["cold", "warm"]
    cold, warm = scenario.tasks
    assert warm.class_names == ("red", "yellow")
    assert warm.templates == ("a photo of a {}.",)
    assert (len(warm.train), len(warm.validation), len(warm.test)) == (10, 2, 6)
    assert (len(cold.train), len(cold.validation), len(cold.test)) == (14, 2, 4)
    for task in scenario.tasks:
        parts = [files_of(task.train), files_of(task.validation), files_of(task.test)]
        assert len(set.union(*parts)) == sum(map(len, parts))
        for source in (task.train, task.validation, task.test):
            owners = [task.class_names[label] for label in source.labels.tolist()]
            assert all(f"{owner}/" in path for owner, path in zip(owners, source.paths, strict=True))
            assert set(owners) == set(task.class_names)
    assert cold.train.image(0).size == (40, 30)


def test_splits_depend_on_the_seed_and_nothing_else(root, tmp_path):
    first, again = load_scenario(root), load_scenario(root)
    assert first.fingerprint() == again.fingerprint()
    shutil.copytree(root, tmp_path / "elsewhere")
    assert load_scenario(tmp_path / "elsewhere").fingerprint() == first.fingerprint()
    assert load_scenario(root, ["warm"]).tasks[0].train.fingerprint() == first.tasks[1].train.fingerprint()
    other = load_scenario(root, seed=1)
    assert other.tasks[0].test.fingerprint() != first.tasks[0].test.fingerprint()
    assert other.tasks[1].test.fingerprint() == first.tasks[1].test.fingerprint()


def test_given_validation_is_used(root):
    for name in ("red", "yellow"):
        draw(root / "warm" / "val" / name / "v.png", name, 7)
    warm = load_scenario(root, ["warm"]).tasks[0]
    assert (len(warm.train), len(warm.validation)) == (12, 2)
    assert files_of(warm.validation) == {"val/red/v.png", "val/yellow/v.png"}


def test_no_validation_if_none_is_wanted(root):
    scenario = load_scenario(root, validation_fraction=0)
    assert [len(task.validation) for task in scenario.tasks] == [0, 0]


def test_class_names_and_templates(root):
    (root / "cold" / "blue").rename(root / "cold" / "deep_blue")
    (root / "templates.txt").write_text("# prompts\na photo of {}\n\nan image of {}\n")
    (root / "warm" / "templates.txt").write_text("a warm {}")
    cold, warm = load_scenario(root).tasks
    assert cold.class_names == ("deep blue", "green")
    assert cold.templates == ("a photo of {}", "an image of {}")
    assert warm.templates == ("a warm {}",)
    (root / "cold" / "classnames.txt").write_text("green: leaf green\ndeep_blue\tthe sea\n")
    assert load_scenario(root).tasks[0].class_names == ("the sea", "leaf green")


def test_reference_images_and_captions(root):
    draw(root / "_reference" / "any" / "0.png", "green", 1)
    (root / "_reference" / "captions.txt").write_text("a thing\nanother thing\n")
    scenario = load_scenario(root)
    assert [task.name for task in scenario.tasks] == ["cold", "warm"]
    assert scenario.reference.captions == ("a thing", "another thing")
    assert scenario.reference.images.labels.tolist() == [-1]


def test_orders(root):
    options = ScenarioOptions(root=root)
    for order, expected in (("I", ["cold", "warm"]), ("II", ["warm", "cold"]), ("warm,cold", ["warm", "cold"])):
        assert [task.name for task in load("folders", options, order=order).tasks] == expected
    assert [task.name for task in load("folders", options, order="warm").tasks] == ["warm"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def move(source: Path, target: Path) -> None:
    source.rename(target)


PROBLEMS = {
    "corrupt image": (
        lambda root: (root / "cold/blue/3.png").write_bytes(b"this is no image at all"),
        r"cold/blue/3\.png is not a readable image \(cannot identify image file it\): replace it or delete it",
    ),
    "empty image": (lambda root: (root / "cold/blue/3.png").write_bytes(b""), r"3\.png .*it is empty"),
    "truncated image": (
        lambda root: truncate(root / "warm/train/red/deeper/2.jpg"),
        r"warm/train/red/deeper/2\.jpg is not a readable image \(.*truncated.*\): replace it",
    ),
    "empty class": (
        lambda root: (root / "warm/train/orange").mkdir() or (root / "warm/test/orange").mkdir(),
        r"warm/train/orange holds no image \(.*\.jpg.*\): add some or delete the folder",
    ),
    "too few images to split": (
        lambda root: [(root / f"cold/blue/{number}.png").unlink() for number in range(8)],
        r"cold/blue holds 2 images, 3 are needed to be split into train, validation and test",
    ),
    "class names that clash": (
        lambda root: shutil.copytree(root / "cold/blue", root / "cold/Blue"),
        r"the class folders Blue and blue both become 'blue'.*rename one, or name them in classnames\.txt",
    ),
    "no test split": (
        lambda root: shutil.rmtree(root / "warm/test"),
        r"warm has train but no test: add .*warm/test, or put the class folders directly into",
    ),
    "no train split": (lambda root: shutil.rmtree(root / "warm/train"), r"warm has test but no train"),
    "a class missing in one split": (
        lambda root: shutil.rmtree(root / "warm/test/red"),
        r"warm/test lacks red compared with .*warm/train: every split needs the same class folders",
    ),
    "a class too many in one split": (
        lambda root: draw(root / "warm/test/blue/0.png", "blue", 0),
        r"warm/test has blue besides",
    ),
    "a single class": (
        lambda root: shutil.rmtree(root / "cold/blue"),
        r"cold needs at least two class folders with images, found only green",
    ),
    "a template without braces": (
        lambda root: (root / "templates.txt").write_text("a photo of {}\na photo of it\n"),
        r"templates\.txt line 2: 'a photo of it' must hold exactly one \{\}",
    ),
    "an empty template file": (lambda root: (root / "templates.txt").write_text("#\n"), r"holds no template"),
    "templates in another encoding": (
        lambda root: (root / "templates.txt").write_bytes("für {}".encode("latin-1")),
        r"templates\.txt cannot be read as UTF-8 text .*save it as UTF-8",
    ),
    "an unknown folder in classnames.txt": (
        lambda root: (root / "cold/classnames.txt").write_text("blue: sea\npurple: ink\n"),
        r"classnames\.txt line 2: 'purple: ink' does not begin with the name of a class folder",
    ),
    "a class without a name": (
        lambda root: (root / "cold/classnames.txt").write_text("blue: sea\n"),
        r"classnames\.txt gives no name to green",
    ),
    "reference images without captions": (
        lambda root: draw(root / "_reference/0.png", "red", 0),
        r"_reference/captions\.txt is missing: write one caption per line",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_told_in_a_sentence_before_anything_starts(problem, root):
    spoil, message = PROBLEMS[problem]
    spoil(root)
    with pytest.raises(DataError, match=message):
        load_scenario(root)


def test_several_problems_are_told_together_and_long_lists_are_cut(root):
    shutil.rmtree(root / "warm/test")
    shutil.rmtree(root / "cold/blue")
    with pytest.raises(DataError, match=r"cold needs at least two .*; .*warm has train but no test"):
        load_scenario(root)


def test_many_damaged_images_are_counted(root):
    for path in (root / "cold/blue").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"; and 5 more$"):
        load_scenario(root)


def test_directories_that_are_no_scenario(tmp_path, root):
    with pytest.raises(DataError, match=r"nowhere is not a directory"):
        load_scenario(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no sub-folders; each task needs a folder of its own"):
        load_scenario(tmp_path / "empty")
    with pytest.raises(
        DataError, match=r"laid out as a single task \(it has test and train\); give its parent, .*images"
    ):
        load_scenario(root / "warm")


def test_orders_that_do_not_fit(root):
    with pytest.raises(DataError, match=r"has no task 'wram'; did you mean warm\?"):
        load_scenario(root, ["wram"])
    with pytest.raises(DataError, match=r"warm is named several times"):
        load_scenario(root, ["warm", "cold", "warm"])
    with pytest.raises(DataError, match=r"data\.test_fraction: expected a share from 0 to below 1, got 1\.5"):
        load_scenario(root, test_fraction=1.5)


def test_decoding_is_checked_once_per_state_of_the_files(root, monkeypatch):
    from cl_methods.scenarios import verification

    load_scenario(root)
    opened = []
    original = verification.Image.open
    monkeypatch.setattr(verification.Image, "open", lambda path: opened.append(path) or original(path))
    load_scenario(root)
    assert not opened
    (root / "cold/blue/3.png").write_bytes(b"damaged since")
    with pytest.raises(DataError, match=r"3\.png is not a readable image"):
        load_scenario(root)


def test_from_a_folder_of_images_to_a_result_and_exact_resume(root, tmp_path, capsys):
    (root / "templates.txt").write_text("a photo of a {} object\n")
    common = ["run", "--scenario", "folders", "--data.root", str(root), "--model", "mini", "--method", "finetune",
              "--method.iterations", "3", "--method.batch-size", "8", "--method.warmup", "1"]  # fmt: skip
    assert main([*common, "--output", str(tmp_path / "a")]) == 0
    assert main([*common, "--output", str(tmp_path / "b"), "--workers", "2"]) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert results[0]["tasks"] == ["cold", "warm"]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["chance"] == [50.0, 50.0]
    (root / "cold/blue/3.png").unlink()
    (tmp_path / "a" / "result.json").unlink()
    capsys.readouterr()
    assert main([*common, "--output", str(tmp_path / "a"), "--resume"]) == 2
    assert "the data of scenario folders has changed" in capsys.readouterr().err

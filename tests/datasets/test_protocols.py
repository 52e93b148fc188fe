"""Whole runs of the published protocols, from miniatures in the datasets' real layouts to the numbers of a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import INCREMENTAL, ORIGINALS, imagenet, write_coop, write_image_folders, write_shards
from PIL import Image
from tiny_clip import CONTEXT, build_backbone, tokenize_whole, transform
from torch.nn import functional as F

from cl_methods.backbone import Backbone
from cl_methods.commands.configuration import parse
from cl_methods.datasets.images import DataError
from cl_methods.methods import METHODS
from cl_methods.scenarios import ScenarioOptions, load
from cl_methods.scenarios.class_order import protocol
from cl_methods.scenarios.mtil import ORDERS
from cl_methods.training import run as run_module

RANPAC = ("--method", "ranpac", "--method.width", "500", "--method.batch-size", "512")


def from_file(image: Image.Image) -> torch.Tensor:
    return transform(torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1))


def reading_backbone() -> Backbone:
    """A backbone that reads the label that the miniatures' colours spell: whoever is given the right labels learns them all."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2 * 625, 64, generator=generator), torch.randn(CONTEXT, 64, generator=generator)
    backbone = build_backbone()
    backbone.tokenize = tokenize_whole
    backbone.train_transform = backbone.eval_transform = from_file

    def read(pixels: torch.Tensor, *, normalise: bool = True) -> torch.Tensor:
        red, green, blue = (12.75 * (pixels[:, :3, 8, 8] + 1)).unbind(dim=1)
        return F.normalize(images[red.round().long() + 25 * green.round().long() + 625 * (blue > 11.6)], dim=1)

    backbone.encode_images = read
    backbone.prompt_features = lambda tokens: F.normalize(torch.sin(tokens.float()) @ texts, dim=1)
    return backbone


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``run(output, root, arguments …)``: what ``clk run`` does, over the backbone that reads colours."""

    def build(config, scenario, device=None):
        return METHODS[config.method](reading_backbone(), config.effective_settings(), scenario.reference)

    def start(output: Path, root: Path, *arguments: str) -> dict[str, Any]:
        fixed = ["--device", "cpu", "--data.root", str(root), "--data.sizes", "any", "--data.cache", "none"]
        return run_module.run(parse([*fixed, *arguments], "")[0], output)

    monkeypatch.setattr(run_module, "build_method", build)
    return start


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of the class-incremental protocols."""
    folder = tmp_path_factory.mktemp("originals")
    for write in (ORIGINALS["CIFAR100"], INCREMENTAL["TinyImageNet"], INCREMENTAL["ImageNet100"]):
        write(folder)
    return folder


def learns(result: dict[str, Any]) -> None:
    """Every image was read and stands under its own label; classes whose names two datasets share learn from both."""
    for name, before, after in zip(result["tasks"], result["zero_shot"], result["accuracy"][-1], strict=True):
        assert after > 70 > before + 30, (name, before, after)


@pytest.mark.slow
def test_imagenet_1000_is_learnt_in_ten_steps(run, tmp_path: Path) -> None:
    """All thousand classes from folders of synsets, a hundred at a time in the published order."""
    imagenet(tmp_path / "data", 1000)
    line = ("--scenario", "cil", "--data.dataset", "ImageNet1000", *RANPAC, "--method.width", "2000")
    result = run(tmp_path / "run", tmp_path / "data", *line)
    assert result["tasks"] == [f"{end - 99}-{end}" for end in range(100, 1001, 100)]
    assert result["class_incremental"]["last"] > 50
    order = protocol("ImageNet1000").class_order
    assert sorted(order) == list(range(1000)) != order


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple(ORIGINALS), ("CIFAR10", "ImageNetR", "CUB200")], ids=["mtil", "others"])
def test_every_dataset_is_learnt_from_its_own_files(names: tuple[str, ...], run, tmp_path: Path) -> None:
    for name in names:
        {**ORIGINALS, **INCREMENTAL}[name](tmp_path / "data")
    result = run(tmp_path / "run", tmp_path / "data", "--scenario", "mtil", "--order", ",".join(names), *RANPAC)
    assert result["tasks"] == list(names)
    assert all(text.startswith("original files, split zscl") for text in result["data"].values())
    learns(result)


def test_copies_in_general_layouts_are_learnt_too(run, tmp_path: Path) -> None:
    write_image_folders(tmp_path / "data", "DTD")
    write_shards(tmp_path / "data", "OxfordPet")
    result = run(tmp_path / "run", tmp_path / "data", "--scenario", "mtil", "--order", "DTD,OxfordPet", *RANPAC)
    assert [result["data"][name].split(",")[0] for name in result["tasks"]] == ["image folders", "WebDataset"]
    learns(result)


@pytest.mark.parametrize(
    ("dataset", "options", "classes"),
    [
        ("CIFAR100", ("--data.steps", "10"), [10] * 10),
        ("TinyImageNet", ("--data.steps", "5"), [100, 20, 20, 20, 20, 20]),
        ("ImageNet100", ("--data.base-classes", "50", "--data.steps", "10"), [50, *[5] * 10]),
    ],
)
def test_class_incremental_protocols(
    dataset: str, options: tuple[str, ...], classes: list[int], originals: Path, run, tmp_path: Path
) -> None:
    fixed = ("--scenario", "cil", "--data.dataset", dataset, *options)
    result = run(tmp_path / "run", originals, *fixed, *RANPAC)
    found, ends = result["class_incremental"], np.cumsum(classes)
    assert result["tasks"] == [f"{end - size + 1}-{end}" for size, end in zip(classes, ends, strict=True)]
    rows = np.array(result["accuracy"])  # one test image per class: classes are images
    steps = [np.average(row[: at + 1], weights=classes[: at + 1]) for at, row in enumerate(rows)]
    assert found["per_step"] == pytest.approx(steps)
    assert (found["average"], found["last"]) == (pytest.approx(np.mean(steps)), pytest.approx(steps[-1]))
    assert steps == pytest.approx([100] * len(classes))
    config, _ = parse([*fixed, "--data.root", str(originals), "--data.sizes", "any"], "")
    scenario = load("cil", config.data)
    order, published = protocol(dataset).class_order, protocol(dataset)
    whole = load(
        "cil", ScenarioOptions(root=originals, sizes="any", dataset=dataset, steps=1, base_classes=0), order="labels"
    )
    names = [name for task in scenario.tasks for name in task.class_names]
    assert names == [whole.tasks[0].class_names[label] for label in order]
    assert {task.templates for task in scenario.tasks} == {(published.template,)}


def test_x_tail_is_one_command(run, tmp_path: Path) -> None:
    """The zero-shot row against the plain computation: one prompt, and the nearest of all different names of all ten datasets."""
    for name in ORDERS["X-TAIL"]:
        write_coop(tmp_path / "data", name)
    result = run(tmp_path / "run", tmp_path / "data", "--scenario", "xtail", *RANPAC, "--method.width", "200")
    assert result["tasks"] == list(ORDERS["X-TAIL"])
    assert (result["config"]["data"]["split"], result["config"]["data"]["shots"]) == ("coop", 16)
    assert result["config"]["evaluation"]["label_space"] == "all"
    tasks = load("xtail", ScenarioOptions(root=tmp_path / "data", sizes="any", split="coop", shots=16)).tasks
    assert {task.templates for task in tasks} == {("a photo of a {}.",)}
    assert tasks[6].class_names[:2] == ('number: "0 - zero"', 'number: "1 - one"')
    union = list(dict.fromkeys(name for task in tasks for name in task.class_names))
    assert len(union) < sum(len(task.class_names) for task in tasks) == 1100
    assert result["chance"] == [pytest.approx(100 / len(union))] * 10
    backbone = reading_backbone()
    classifier = backbone.class_embeddings(union, ("a photo of a {}.",))
    expected = []
    for task in tasks:
        images = torch.stack([from_file(task.test.image(index)) for index in range(len(task.test))])
        with torch.no_grad():
            predicted = (backbone.encode_images(images) @ classifier.T).argmax(dim=1).tolist()
        right = [
            union[place] == task.class_names[label]
            for place, label in zip(predicted, task.test.labels.tolist(), strict=True)
        ]
        expected.append(100 * sum(right) / len(right))
    assert result["zero_shot"] == pytest.approx(expected)
    assert np.mean(result["accuracy"][-1]) > 10 * np.mean(expected)


@pytest.mark.parametrize(
    ("options", "order", "message"),
    [
        ({}, "II", r"order: xtail has the order I of its public code, or datasets separated by commas; got 'II'"),
        (
            {"root": None},
            "I",
            r"data\.root: scenario xtail needs the folder .* `clk data check --root FOLDER --datasets X-TAIL",
        ),
        ({}, "I", r"10 of 10 datasets are not there.*Aircraft, Caltech101, DTD.* --split coop` says what to put where"),
        ({}, "DTD", r"DTD is not in .*split_zhou_DescribableTextures\.json"),
    ],
)
def test_what_x_tail_cannot_run(options: dict[str, Any], order: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load("xtail", ScenarioOptions(**{"root": tmp_path, "split": "coop", **options}), order=order)


def test_settings_of_x_tail_are_those_of_few_shots() -> None:
    few, full = (METHODS["moe_adapters"].default_config(f"mtil{kind}") for kind in ("_few_shot", ""))
    line = ["--scenario", "xtail", "--method", "moe_adapters"]
    assert parse(line, "")[0].settings == few != full
    config = parse([*line, "--data.shots", "None", "--evaluation.label-space", "seen"], "")[0]
    assert (config.settings, config.data.shots, config.evaluation.label_space) == (full, None, "seen")

"""Class-incremental runs over one dataset, and MTIL without the identity of the task, from miniatures to results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from miniatures import INCREMENTAL, ORIGINALS, spelt
from PIL import Image
from rich.console import Console
from tiny_clip import build_backbone, tokenize_whole, transform

from cl_methods.commands.configuration import parse
from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import classes
from cl_methods.evaluation.accuracy import EvaluationOptions, measure
from cl_methods.evaluation.report import compare, write_run_report
from cl_methods.methods import METHODS
from cl_methods.scenarios import ScenarioOptions, load
from cl_methods.scenarios.cil import task_sizes
from cl_methods.scenarios.class_order import class_order, protocol
from cl_methods.scenarios.mtil import ORDERS
from cl_methods.training import run as run_module

PUBLISHED = {"CIFAR100": 100, "TinyImageNet": 200, "ImageNet100": 100, "ImageNet1000": 1000}


def from_file(image: Image.Image) -> torch.Tensor:
    return transform(torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1))


def build(config, scenario, device=None):
    """The configured method over the tiny CLIP."""
    backbone = build_backbone()
    backbone.tokenize = tokenize_whole
    backbone.train_transform = backbone.eval_transform = from_file
    return METHODS[config.method](backbone, config.effective_settings(), scenario.reference)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cil")
    for name in ("CIFAR10", "TinyImageNet"):
        INCREMENTAL[name](folder)
    for name in ("CIFAR100", "EuroSAT", "MNIST"):
        ORIGINALS[name](folder)
    return folder


@pytest.fixture
def run(monkeypatch, root):
    """``run(output, arguments …)``: what ``clk run`` does on scenario cil, over the tiny CLIP."""

    def start(output, *arguments, scenario="cil", resume=False):
        fixed = ["--scenario", scenario, "--device", "cpu", "--data.root", root, "--data.sizes", "any"]
        config, _ = parse([*map(str, (*fixed, *arguments))], "")
        return run_module.run(config, output, resume=resume)

    monkeypatch.setattr(run_module, "build_method", build)
    return start


def scenario_of(root, dataset, order="I", **options):
    return load("cil", ScenarioOptions(root=root, sizes="any", dataset=dataset, **options), order=order)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_orders_are_permutations(name, count):
    published = protocol(name)
    assert sorted(published.class_order) == list(range(count)) == list(range(len(classes(name, "zscl"))))
    assert published.template.count("{}") == 1
    assert published.base_classes == (100 if name == "TinyImageNet" else 0)
    assert class_order("I", name, count) == published.class_order != class_order("labels", name, count)


def test_a_drawn_order_is_numpys():
    assert class_order("random-1993", "CIFAR100", 100)[:5] == (68, 56, 78, 8, 23)
    assert class_order("random-1", "CUB200", 200) != class_order("random-2", "CUB200", 200)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_every_image_of_a_class_is_in_the_task_of_its_class(root, steps):
    tasks = scenario_of(root, "CIFAR100", steps=steps).tasks
    assert len(tasks) == steps
    order, seen = protocol("CIFAR100").class_order, []
    for number, task in enumerate(tasks):
        chosen = order[number * 100 // steps : (number + 1) * 100 // steps]
        assert task.class_names == tuple(classes("CIFAR100", "zscl").keys[label] for label in chosen)
        assert task.templates == ("a bad photo of a {}.",)
        for source, per_class in ((task.train, 2), (task.test, 1), (task.validation, 0)):
            assert len(source) == per_class * len(chosen)
            shown = [spelt(source.image(index)) for index in range(len(source))]
            assert shown == [chosen[label] for label in source.labels.tolist()]
        seen += task.class_names
    assert len(set(seen)) == 100
    assert any("_" in name for name in seen)


def test_base_classes_come_first(root):
    tasks = scenario_of(root, "TinyImageNet", steps=5).tasks
    assert [len(task.class_names) for task in tasks] == [100, 20, 20, 20, 20, 20]
    assert [task.name for task in tasks][:3] == ["1-100", "101-120", "121-140"]
    assert tasks[0].class_names[0] == classes("TinyImageNet", "zscl").names[131]
    assert task_sizes("ImageNet100", 100, 10, 50) == (50, *[5] * 10)
    assert [len(task.class_names) for task in scenario_of(root, "TinyImageNet", base_classes=0, steps=4).tasks] == [
        50
    ] * 4
    single = scenario_of(root, "CIFAR10", "labels", steps=10).tasks
    assert [task.name for task in single] == [str(number) for number in range(1, 11)]


def test_order_steps_and_shots_change_the_fingerprint(root):
    variants = [
        scenario_of(root, "CIFAR10", order, **options).fingerprint()
        for order, options in (("labels", {"steps": 5}), ("random-0", {"steps": 5}), ("labels", {"steps": 2}))
    ]
    few = scenario_of(root, "CIFAR10", "labels", steps=5, shots=1)
    assert len({*variants, few.fingerprint()}) == 4
    assert scenario_of(root, "CIFAR10", "labels", steps=5).fingerprint() == variants[0]
    assert [len(task.train) for task in few.tasks] == [2] * 5


def test_validation_images_come_from_the_task(root):
    tasks = scenario_of(root, "CIFAR10", "labels", steps=5, validation_fraction=0.2).tasks
    assert [(len(task.train), len(task.validation), len(task.test)) for task in tasks] == [(8, 2, 2)] * 5
    for number, task in enumerate(tasks):
        shown = [spelt(task.validation.image(index)) - 2 * number for index in range(2)]
        assert shown == task.validation.labels.tolist()


def test_defaults_of_the_command(root):
    config, _ = parse(
        ["--scenario", "cil", "--method", "zscl", "--data.root", str(root), "--data.dataset", "CIFAR100"], ""
    )
    assert config.evaluation.label_space == "seen"
    assert config.settings == METHODS["zscl"].default_config("cil")
    assert (config.data.steps, len(load("cil", ScenarioOptions(root=root, sizes="any", dataset="CIFAR100")).tasks)) == (
        None,
        10,
    )
    config, _ = parse(["--scenario", "cil", "--evaluation.label-space", "all"], "")
    assert config.evaluation.label_space == "all"
    assert parse(["--scenario", "mtil"], "")[0].evaluation.label_space == "task"


def test_zero_shot_is_measured_among_the_classes_of_every_stage(root, run, tmp_path):
    """Against the plain computation: all test images seen so far, one classifier over all classes seen so far."""
    arguments = ["--data.dataset", "CIFAR100", "--data.steps", 4, "--method", "zero_shot"]
    result = run(tmp_path / "run", *arguments)
    published, names = protocol("CIFAR100"), classes("CIFAR100", "zscl").keys
    backbone, tasks = build_backbone(), scenario_of(root, "CIFAR100", steps=4).tasks
    backbone.tokenize = tokenize_whole
    expected = []
    for learnt in range(1, 5):
        order = published.class_order[: 25 * learnt]
        weights = backbone.class_embeddings([names[label] for label in order], (published.template,))
        sources = [task.test for task in tasks[:learnt]]
        images = [source.image(index) for source in sources for index in range(len(source))]
        with torch.no_grad():
            features = backbone.encode_images(torch.stack([from_file(image) for image in images]))
        predicted = (features @ weights.T).argmax(dim=1).tolist()
        right = [order[place] == spelt(image) for place, image in zip(predicted, images, strict=True)]
        expected.append(100 * sum(right) / len(right))
    found = result["class_incremental"]
    assert found["per_step"] == pytest.approx(expected)
    assert found["average"] == pytest.approx(sum(expected) / 4)
    assert found["last"] == pytest.approx(expected[-1]) == pytest.approx(result["last"])
    assert expected[0] != expected[-1]


def test_training_resuming_and_comparing(root, run, tmp_path):
    arguments = ["--data.dataset", "CIFAR10", "--order", "random-0", "--data.steps", 3, "--data.base-classes", 4]
    arguments += ["--method.epochs", "None", "--method.iterations", 3]
    result = run(tmp_path / "runs" / "a", *arguments, "--method", "finetune")
    assert result["tasks"] == ["1-4", "5-6", "7-8", "9-10"]
    matrix, weights = np.array(result["accuracy"]), np.array([4, 2, 2, 2])
    steps = [(matrix[step, : step + 1] * weights[: step + 1]).sum() / weights[: step + 1].sum() for step in range(4)]
    assert result["class_incremental"]["per_step"] == pytest.approx(steps)
    assert json.loads((tmp_path / "runs" / "a" / "result.json").read_text()) == result
    (tmp_path / "report").mkdir()
    write_run_report(result, tmp_path / "report", Console(file=io.StringIO()))
    cells = " | ".join(f"{value:.1f}" for value in steps)
    assert f"| {np.mean(steps):.1f} | {steps[-1]:.1f} | {cells} |" in (tmp_path / "report" / "report.md").read_text()
    (tmp_path / "runs" / "a" / "result.json").unlink()
    assert (
        run(tmp_path / "runs" / "a", *arguments, "--method", "finetune", resume=True)["accuracy"] == result["accuracy"]
    )
    joint = run(tmp_path / "runs" / "b", *arguments, "--method", "joint")["class_incremental"]
    assert (joint["average"], joint["per_step"]) == (None, None)
    assert 0 <= joint["last"] <= 100
    text = io.StringIO()
    compare([tmp_path / "runs"], tmp_path / "compare", Console(file=text, width=240))
    assert (
        "Accuracy over all classes learnt so far, cil CIFAR10, order random-0 (ViT-B-16-quickgelu, label space seen, zscl splits"
        in text.getvalue()
    )
    table = (tmp_path / "compare" / "table.md").read_text().split("### Accuracy over all classes")[1].split("###")[0]
    cells = [f"{value:.1f}" for value in (np.mean(steps), steps[-1], *steps)]
    assert f"| finetune | 1 | {' | '.join(cells)} |" in table
    assert f"| joint (bound) | 1 | – | {joint['last']:.1f} |" in table
    alone = run(tmp_path / "c", *arguments, "--method", "finetune", "--evaluation.label-space", "task")
    assert "class_incremental" not in alone


def test_mtil_without_the_identity_of_the_task(root, run, tmp_path):
    arguments = ["--order", "EuroSAT,MNIST", "--method", "zero_shot", "--evaluation.label-space", "all"]
    result = run(tmp_path / "run", *arguments, scenario="mtil")
    assert result["chance"] == [5.0, 5.0]
    assert "class_incremental" not in result
    config, _ = parse([*arguments, "--scenario", "mtil"], "")
    scenario = load("mtil", ScenarioOptions(root=root, sizes="any"), order="EuroSAT,MNIST")
    method = build(config, scenario)
    union = [measure(method, task, scenario.tasks, EvaluationOptions(label_space="all")) for task in scenario.tasks]
    assert result["zero_shot"] == [entry.accuracy for entry in union]
    assert ORDERS["X-TAIL"] == tuple(name for name in ORDERS["I"] if name != "CIFAR100")


@pytest.mark.parametrize(
    ("options", "order", "message"),
    [
        ({"dataset": None}, "I", r"data\.dataset: scenario cil needs a dataset to split, one of Aircraft"),
        ({"dataset": "CIFAR1000"}, "I", r"data\.dataset: there is no dataset 'CIFAR1000'; did you mean CIFAR100\?"),
        ({"dataset": "tiny-imagenet"}, "I", r"there is no dataset 'tiny-imagenet'; did you mean TinyImageNet\?"),
        ({"dataset": "dogs"}, "I", r"there is no dataset 'dogs'; there are Aircraft"),
        ({"root": None}, "I", r"data\.root: scenario cil needs the folder"),
        ({"steps": 0}, "I", r"data\.steps: expected a number >= 1, got 0"),
        (
            {"steps": 30},
            "I",
            r"100 classes of CIFAR100 cannot be shared .* 30 steps; these can: 1, 2, 4, 5, 10, 20, 25, 50, 100$",
        ),
        ({"steps": 3, "base_classes": 50}, "I", r"50 classes of CIFAR100 after 50 base classes cannot"),
        ({"base_classes": 100}, "I", r"data\.base_classes: expected 0 to 99 of the 100 classes of CIFAR100, got 100"),
        ({"base_classes": -1}, "I", r"data\.base_classes: expected 0 to 99 .*, got -1"),
        ({"dataset": "CIFAR10"}, "I", r"order: no order of the classes of CIFAR10 was published.*--order random-1993"),
        ({}, "II", r"order: scenario cil has I, labels, random-SEED and files NAME\.yaml, got 'II'"),
        ({}, "random-4294967296", r"order: expected random-SEED with a seed up to 4294967295"),
        ({}, "/nowhere/order.yaml", r"order: /nowhere/order\.yaml does not exist"),
        (
            {"sizes": "published"},
            "I",
            r"images of CIFAR100 for training, validation and test where the published split",
        ),
        ({"dataset": "CUB200"}, "labels", r"CUB200 is not in"),
    ],
)
def test_what_cannot_be_run(options, order, message, root):
    with pytest.raises(DataError, match=message):
        load("cil", ScenarioOptions(**{"root": root, "sizes": "any", "dataset": "CIFAR100", **options}), order=order)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class_order: [0, 1, 2]", r"has 3 labels, and the dataset 10 classes"),
        ("class_order: [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]", r"expected every label once, got 8 more than once"),
        ("class_order: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]", r"expected labels from 0 to 9, got 10"),
        ("class_order: [0, 1, 2, 3, 4, 5, 6, 7, 8, frog]", r"class_order must be a list of whole numbers"),
        ("class_order: 3", r"class_order must be a list of whole numbers"),
        ("[0, 1]", r"has no list `class_order: \[label, …\]`"),
        ("class_order: [0, 1", r"is not valid YAML"),
        (b"\xff\xfe\x00", r"is not valid YAML"),
    ],
)
def test_files_with_an_order_that_cannot_be_used(content, message, root, tmp_path):
    path = tmp_path / "order.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        scenario_of(root, "CIFAR10", str(path))


def test_an_order_from_a_file(root, tmp_path):
    path = tmp_path / "order.yaml"
    path.write_text(yaml.safe_dump({"class_order": list(range(9, -1, -1))}))
    tasks = scenario_of(root, "CIFAR10", str(path), steps=5).tasks
    assert tasks[0].class_names == tuple(DATASETS["CIFAR10"].classes("zscl").names[label] for label in (9, 8))

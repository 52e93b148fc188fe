"""Scores of every method on ``mini``: the same for one label space or all, from pixels or kept features; nothing encoded twice."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.datasets.images import Subset
from cl_methods.datasets.task import Task
from cl_methods.evaluation.accuracy import EvaluationOptions, feature_store, measure, measure_spaces, row_reader
from cl_methods.evaluation.features import EvaluationImages
from cl_methods.evaluation.options import competing_tasks, evaluated_images
from cl_methods.methods import METHODS, Method
from cl_methods.methods.base import Batch
from cl_methods.scenarios.base import Scenario
from cl_methods.training import building
from cl_methods.training import run as run_module
from cl_methods.training.building import build_method, select_scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.progress import RunProgress
from cl_methods.training.run import run
from cl_methods.training.task import TaskTraining

TASKS = 2
OPTIONS = EvaluationOptions(label_space=("task", "seen", "all"), limit=12, batch_size=8)
SMALL: dict[str, Any] = {
    "width": 60,
    "rank": 30,
    "batch_size": 8,
    "memory": 40,
    "memory_per_class": 1,
    "fisher_samples": 4,
    "reference_batch_size": 11,
}
FROZEN = ("zero_shot", "ranpac", "loranpac", "proof", "clap4clip")


def config(name: str, **changes: Any) -> RunConfig:
    """A run of two steps per task over the first tasks of ``mini``."""
    settings = RunConfig(name, METHODS[name].default_config("mini"), limit_iterations=1).effective_settings()
    known = {entry.name for entry in dataclasses.fields(settings)}
    settings = dataclasses.replace(settings, **{key: value for key, value in SMALL.items() if key in known})
    if name == "moe_adapters":
        settings = dataclasses.replace(
            settings, ddas=dataclasses.replace(settings.ddas, iterations=60, generic_iterations=20)
        )
    values = {"limit_tasks": TASKS, "evaluation": dataclasses.replace(OPTIONS), "device": "cpu", **changes}
    return RunConfig(name, settings, **values)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """The first tasks of ``mini`` with every tenth image for training, and as many to compare with."""
    whole = select_scenario(config("zero_shot"))
    tasks = tuple(
        dataclasses.replace(task, train=Subset(task.train, torch.arange(0, len(task.train), 10)))
        for task in whole.tasks
    )
    reference = dataclasses.replace(whole.reference, images=Subset(whole.reference.images, torch.arange(100)))
    return dataclasses.replace(whole, tasks=tasks, reference=reference)


def learnt(name: str, scenario: Scenario, tasks: int) -> Method:
    method = build_method(config(name), scenario, torch.device("cpu"))
    method.expect(scenario.tasks)
    if method.trains:
        for index in [0] if method.joint else range(tasks):
            TaskTraining(method, index, scenario.tasks).execute()
    return method


def batches(method: Method, task: Task, store: Any) -> Iterator[tuple[Any, Tensor]]:
    reader = row_reader(method, [task], OPTIONS)
    images = EvaluationImages(reader, 0, name=task.name, device=torch.device("cpu"), store=store)
    reader.begin([(0, number) for number in images.batches])
    yield from images


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_each_label_space_alone(name: str, scenario: Scenario) -> None:
    """To the bit: from pixels one label space at a time, all together, and from the features that a store has kept."""
    tasks, method = scenario.tasks, learnt(name, scenario, 1)
    method.before_evaluation()
    store = feature_store(tasks, OPTIONS)
    for task in tasks:
        for again in range(2):
            for batch, _ in batches(method, task, store):
                together = method.scores(batch, tasks)
                pixels = batch.pixels()
                for candidate, scores in zip(tasks, together, strict=True):
                    assert torch.equal(scores, method.logits(pixels, candidate)), (task.name, candidate.name, again)
    kept = {encoder.split()[0] if encoder.startswith("error ") else encoder for encoder, _, _ in store._kept}
    frozen = {name: {"plain"} for name in FROZEN} | {"proof": {"not normalised"}, "diki": {"plain"}}
    assert kept == (frozen | {"moe_adapters": {"plain", "detector", "error"}}).get(name, set())


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Images and calls of the text tower while rows are measured, and the number of rows."""
    found: Counter[str] = Counter()
    measuring = []

    def counting(kind: str, count: Any) -> None:
        original = getattr(Backbone, kind)

        def call(backbone: Backbone, given: Tensor, **options: Any) -> Tensor:
            found[kind] += count(given) if measuring else 0
            return original(backbone, given, **options)

        monkeypatch.setattr(Backbone, kind, call)

    def row(*arguments: Any, **options: Any) -> Any:
        measuring.append(True)
        found["rows"] += 1
        try:
            return measure_spaces(*arguments, **options)
        finally:
            measuring.pop()

    counting("encode_images", len)
    counting("encode_texts", lambda tokens: 1)
    counting("prompt_features", lambda tokens: 1)
    monkeypatch.setattr(run_module, "measure_spaces", row)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_run_encodes_no_image_twice(
    name: str, scenario: Scenario, encoded: Counter[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three label spaces; once per run where images have frozen features, else once per row. One call for texts per row or run."""
    monkeypatch.setattr(run_module, "select_scenario", lambda config: scenario)
    result = run(config(name), tmp_path / "run")
    images = sum(len(evaluated_images(task, OPTIONS)) for task in scenario.tasks)
    assert images == TASKS * 12
    rows = encoded["rows"]
    assert rows == {"zero_shot": 1, "joint": 2}.get(name, 1 + TASKS)
    if name in FROZEN:
        assert encoded["encode_images"] == images
    elif name == "moe_adapters":  # what the plain model gets is encoded once, what a router gets once per row
        assert images < encoded["encode_images"] < rows * images
    else:
        assert encoded["encode_images"] == rows * images
    if name in (*FROZEN, "snd", "clipood"):  # proof keeps the single prompts of learnt classes besides
        assert encoded["encode_texts"] + encoded["prompt_features"] == 1 + TASKS * (name == "proof")
    elif name == "icarl":  # after the last task there are means for all
        assert encoded["encode_texts"] + encoded["prompt_features"] == rows - 1
    elif name not in ("moe_adapters", "diki"):
        assert encoded["encode_texts"] + encoded["prompt_features"] == rows
    assert set(result["label_spaces"]) == {"seen", "all"}
    assert result["evaluated"] == {
        "limit": 12,
        "images": [12] * TASKS,
        "available": [len(t.test) for t in scenario.tasks],
    }


@pytest.mark.parametrize("name", ["ranpac", "moe_adapters"])
def test_a_resumed_run_computes_its_features_again_to_the_bit(name: str, scenario: Scenario, tmp_path: Any) -> None:
    class Stop(RunProgress):
        def row_finished(self, after: str, row: list[float]) -> None:
            if after != "zero-shot":
                raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "select_scenario", lambda config: scenario)
        whole = run(config(name), tmp_path / "whole")
        with pytest.raises(InterruptedError):
            run(config(name), tmp_path / "parts", progress=Stop())
        resumed = run(config(name), tmp_path / "parts", resume=True)
    for key in ("zero_shot", "accuracy", "calibration_error_per_row", "reliability", "label_spaces"):
        assert resumed[key] == whole[key], key


def test_several_label_spaces_are_what_each_gives_alone(scenario: Scenario) -> None:
    method = learnt("ranpac", scenario, 1)
    rows = measure_spaces(method, scenario.tasks, 1, OPTIONS)
    for space, row in rows.items():
        alone = dataclasses.replace(OPTIONS, label_space=space)
        for index, task in enumerate(scenario.tasks):
            assert row[index] == measure(method, task, competing_tasks(scenario.tasks, index, 1, space), alone)
    assert rows["task"] != rows["all"]


def test_a_store_without_room_changes_nothing_but_the_work(scenario: Scenario, encoded: Counter[str]) -> None:
    method, notes, tasks = learnt("ranpac", scenario, 1), list[str](), scenario.tasks
    small = dataclasses.replace(OPTIONS, feature_memory=1e-6)
    stores = [feature_store(tasks, options, notes.append) for options in (OPTIONS, small)]
    rows = [[run_module.measure_spaces(method, tasks, 1, OPTIONS, store=store) for store in stores] for _ in range(2)]
    assert rows[0][0] == rows[0][1] == rows[1][0] == rows[1][1]
    assert encoded["encode_images"] == 3 * TASKS * 12
    assert stores[1].bytes == 0 < stores[0].bytes
    assert len(notes) == 1
    assert notes[0].startswith("evaluation.feature_memory: 1e-06 GiB cannot hold the plain features of 24 images")


def test_all_classifiers_of_a_row_come_from_one_batch(scenario: Scenario, encoded: Counter[str]) -> None:
    """Equal to those of each task alone, whichever is asked for first."""
    method = build_method(config("finetune"), scenario, torch.device("cpu"))
    alone = [method.embed_classes([task])[0] for task in scenario.tasks]
    method.expect(scenario.tasks)
    for task, expected in reversed(list(zip(scenario.tasks, alone, strict=True))):
        torch.testing.assert_close(method.classifier(task), expected, rtol=0, atol=1e-6)
    run_module.measure_spaces(method, scenario.tasks, 0, OPTIONS)
    assert encoded["encode_texts"] + encoded["prompt_features"] == 1


def test_a_method_that_trains_the_image_tower_cannot_call_it_frozen(scenario: Scenario, tmp_path: Any) -> None:
    class Wrong(METHODS["finetune"]):  # type: ignore[misc]
        name = "wrong"
        frozen_images = True

        def loss(self, batch: Batch) -> dict[str, Tensor]:
            raise AssertionError("the check comes before the first step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "find_method", lambda name: Wrong)
        with pytest.raises(ValueError, match=r"frozen_images: wrong says .* but it trains visual\."):
            run(config("finetune"), tmp_path / "run")


def test_limited_images_are_spread_over_the_classes(scenario: Scenario) -> None:
    for task in scenario.tasks:
        for limit in (1, 7, 50):
            chosen = evaluated_images(task, EvaluationOptions(limit=limit))
            counts = chosen.labels.bincount(minlength=len(task.class_names))
            exact = limit * task.test.labels.bincount(minlength=len(task.class_names)) / len(task.test)
            assert len(chosen) == limit
            assert ((counts >= exact.floor()) & (counts <= exact.ceil())).all()
            assert len({int(index) for index in chosen.indices}) == limit
        assert evaluated_images(task, EvaluationOptions(limit=10**6)) is task.test


def test_options_are_checked() -> None:
    assert EvaluationOptions(label_space=("seen",)).label_space == "seen"
    for changes, message in (
        ({"label_space": ()}, "label_space: expected different ones"),
        (
            {"label_space": ("task", "task")},
            "label_space: expected different ones of task, seen and all, got task task",
        ),
        ({"limit": 0}, "limit: expected a number of images >= 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"feature_memory": -1.0}, "feature_memory: expected GiB >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationOptions(**changes)

"""Accuracies: counting, label spaces, names shared between tasks, class embeddings once per row."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from fakes import TinyConfig, TinyMethod, tiny_backbone

from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Task
from cl_methods.evaluation.accuracy import (
    EvaluationOptions,
    competing_tasks,
    guessing,
    measure,
    measure_row,
    measure_spaces,
    row_reader,
)
from cl_methods.evaluation.uncertainty import expected_calibration_error


class Oracle(TinyMethod):
    """Scores by brightness: every image of brightness v is most like the class whose number is v, in any task."""

    values: dict[str, int]

    def logits(self, images, task):
        brightness = (images[:, 0, 0, 0] * 127.5 + 127.5).round()
        targets = torch.tensor([self.values[name] for name in task.class_names], dtype=torch.float32)
        return -(brightness[:, None] - targets).abs()


def make_task(name: str, classes: dict[str, int], shown: list[int], labels: list[int]) -> Task:
    images = torch.tensor(shown, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    source = TensorImages(images, torch.tensor(labels))
    empty = TensorImages(images[:0], torch.tensor([], dtype=torch.int64))
    return Task(name, tuple(classes), ("a {}.",), source, empty, source)


@pytest.fixture
def method() -> Oracle:
    oracle = Oracle(tiny_backbone(), TinyConfig())
    oracle.values = {"cat": 10, "dog": 20, "cow": 12, "pig": 30}
    return oracle


@pytest.fixture
def tasks() -> list[Task]:
    return [
        make_task("pets", {"cat": 10, "dog": 20}, [10, 13, 20, 19, 11], [0, 0, 1, 1, 1]),
        make_task("farm", {"cow": 12, "pig": 30}, [12, 30, 11, 10], [0, 1, 0, 0]),
        make_task("both", {"dog": 20, "cat": 10}, [20, 10], [0, 1]),
    ]


def test_counts_images_whose_best_class_is_the_right_one(method, tasks):
    assert measure(method, tasks[0], tasks[:1], EvaluationOptions()).accuracy == pytest.approx(80.0)
    assert measure(method, tasks[0], tasks[:1], EvaluationOptions(batch_size=2)).accuracy == pytest.approx(80.0)
    assert measure(method, tasks[1], tasks[1:2], EvaluationOptions()).accuracy == 100.0


def test_more_classes_make_it_harder(method, tasks):
    # 13 is nearer to cow (12) than to cat (10); of the farm's images 10 is a cat, and 11 a tie that the first class wins
    assert measure(method, tasks[0], tasks[:2], EvaluationOptions()).accuracy == pytest.approx(60.0)
    assert measure(method, tasks[1], tasks[:2], EvaluationOptions()).accuracy == pytest.approx(50.0)


def test_a_class_of_the_same_name_in_another_task_counts_as_right(method, tasks):
    assert measure(method, tasks[2], tasks, EvaluationOptions()).accuracy == 100.0


def test_calibration_is_that_of_all_images_together(method, tasks):
    # scores are minus distances; among cat 10, dog 20 and cow 12, pig 30 the image 13 is taken for a cow
    scores = -(torch.tensor([10.0, 13, 20, 19, 11])[:, None] - torch.tensor([10.0, 20, 12, 30])).abs()
    expected = 100 * expected_calibration_error(scores, torch.tensor([0, 0, 1, 1, 1]))
    for size in (1, 2, 5):
        measured = measure(method, tasks[0], tasks[:2], EvaluationOptions(batch_size=size))
        assert measured.calibration_error == pytest.approx(expected, abs=1e-6)
        bins = measured.reliability
        assert (sum(bins["count"]), sum(bins["correct"])) == (5, 3)
        gaps = [abs(right - sure) for right, sure in zip(bins["correct"], bins["confidence"], strict=True)]
        assert 100 * sum(gaps) / 5 == pytest.approx(expected, abs=1e-6)


def test_probabilities_of_classes_of_the_same_name_are_added(method, tasks):
    scores = -(torch.tensor([20.0, 10])[:, None] - torch.tensor([10.0, 20, 12, 30, 20, 10])).abs()
    merged = scores.double().softmax(1)[:, [0, 1, 2, 3]]
    merged[:, [1, 0]] += scores.double().softmax(1)[:, [4, 5]]
    expected = 100 * expected_calibration_error(merged, torch.tensor([1, 0]), probabilities=True)
    found = measure(method, tasks[2], tasks, EvaluationOptions()).calibration_error
    assert found == pytest.approx(expected, abs=1e-6)


def test_label_spaces(tasks):
    names = [
        [task.name for task in competing_tasks(tasks, 1, learnt, space)]
        for space, learnt in (("task", 3), ("seen", 0), ("seen", 1), ("seen", 3), ("all", 0))
    ]
    assert names == [["farm"], ["farm"], ["pets", "farm"], ["pets", "farm", "both"], ["pets", "farm", "both"]]
    with pytest.raises(ValueError, match="label_space: expected task, seen or all, got 'each'"):
        competing_tasks(tasks, 0, 0, "each")


def test_guessing_among_the_classes_that_compete(tasks):
    assert [guessing(tasks, index, "task") for index in range(3)] == [50.0] * 3
    assert [guessing(tasks, 0, space) for space in ("seen", "all")] == [25.0] * 2


def test_a_row_prepares_the_method_once(method, tasks):
    prepared = []
    method.before_evaluation = lambda: prepared.append(True)
    seen = []
    row = measure_row(method, tasks, 1, EvaluationOptions(label_space="seen"), on_task=lambda *item: seen.append(item))
    assert prepared == [True]
    accuracies = [entry.accuracy for entry in row]
    assert accuracies == pytest.approx([80.0, 50.0, 100.0])
    assert seen == list(enumerate(accuracies))


def test_what_cannot_be_evaluated_is_named(method, tasks):
    with pytest.raises(ValueError, match=r"evaluation\.split: task pets has no validation images"):
        measure(method, tasks[0], tasks[:1], EvaluationOptions(split="validation"))
    method.values["cat"] = float("nan")
    with pytest.raises(ValueError, match="logits of tiny on pets: some are NaN"):
        measure(method, tasks[0], tasks[:1], EvaluationOptions())
    method.logits = lambda images, task: torch.zeros(len(images), 7)
    with pytest.raises(ValueError, match=r"expected \(5, 2\), got \(5, 7\)"):
        measure(method, tasks[0], tasks[:1], EvaluationOptions())


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_share_one_reader(method, tasks, workers):
    """The same rows as each with a reader of its own, also where a row asks for some of its pixels only."""
    options = EvaluationOptions(batch_size=2)
    expected = measure_spaces(method, tasks, 1, options)
    started = []
    with closing(row_reader(method, tasks, options, workers)) as reader:
        read = reader._reader.read
        reader._reader.read = lambda wanted: started.append(list(wanted)) or read(wanted)
        assert [measure_spaces(method, tasks, 1, options, reader=reader) for _ in range(2)] == [expected] * 2
        every = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
        assert started == [every] * 2  # one order for all tasks, so that workers read across their borders
        reader.begin(every)
        assert len(reader.read(0, 1)) == len(reader.read(2, 0)) == 2
        assert len(reader.read(0, 2)) == 1
        assert started[2:] == [every[1:], every[5:], every[2:]]

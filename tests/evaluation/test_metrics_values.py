"""Metrics on matrices small enough to check by hand, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from cl_methods.evaluation import class_incremental_metrics, forgetting, mtil_metrics

MATRIX = [[90.0, 50.0, 40.0], [80.0, 95.0, 30.0], [70.0, 85.0, 99.0]]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda rows: torch.tensor(rows).half()])
def test_by_hand(convert):
    metrics = mtil_metrics(convert(MATRIX))
    assert metrics["transfer_per_task"] == [50.0, 35.0]
    assert metrics["transfer"] == 42.5  # a mean over tasks; over entries it would be 40
    assert metrics["average"] == pytest.approx(sum(map(sum, MATRIX)) / 9)
    assert metrics["last_per_task"] == [70.0, 85.0, 99.0]


def test_forgetting_counts_from_when_a_task_was_learnt():
    assert forgetting(MATRIX) == pytest.approx(((90 - 70) + (95 - 85)) / 2)
    assert forgetting([[10.0, 99.0], [20.0, 50.0]]) == -10


def test_a_single_task_has_no_transfer():
    metrics = mtil_metrics([[50.0]])
    assert math.isnan(metrics["transfer"])
    assert metrics["last"] == metrics["average"] == 50
    assert forgetting([[50.0]]) == 0


@pytest.mark.parametrize("matrix", [[], [[1.0, 2.0]], [[1.0], [2.0, 3.0]], [1.0, 2.0], [["a"]]])
def test_refuses_what_is_not_square(matrix):
    with pytest.raises(ValueError, match="matrix: expected"):
        mtil_metrics(matrix)


def test_refuses_missing_entries():
    with pytest.raises(ValueError, match="row 1, column 0"):
        mtil_metrics([[1.0, 2.0], [float("nan"), 3.0]])


def test_class_incremental_counts_images_and_only_what_was_learnt():
    found = class_incremental_metrics(MATRIX, [10, 20, 70])
    second, third = (10 * 80 + 20 * 95) / 30, (10 * 70 + 20 * 85 + 70 * 99) / 100
    assert found["per_step"] == pytest.approx([90.0, second, third])
    assert found["average"] == pytest.approx((90 + second + third) / 3)
    assert found["last"] == pytest.approx(third)
    other = [[90.0, 0.0, 7.0], [80.0, 95.0, 0.0], [70.0, 85.0, 99.0]]
    assert class_incremental_metrics(other, [10, 20, 70]) == found


@pytest.mark.parametrize("images", [[10, 20], [10, 20, 0], [10, -1, 5], [[1], [2], [3]]])
def test_class_incremental_needs_a_number_of_images_per_task(images):
    with pytest.raises(ValueError, match=r"images: expected 3 numbers > 0, one per task, got"):
        class_incremental_metrics(MATRIX, images)

"""Calibration error, uncertainty scores and detection measures against their definitions, written out one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_methods.components.uncertainty import uncertainty
from cl_methods.evaluation.uncertainty import expected_calibration_error, novelty_detection, separation


def calibration_by_definition(probabilities: list[list[float]], labels: list[int], bins: int) -> float:
    error = 0.0
    for m in range(bins):
        inside = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if m / bins < max(row) <= (m + 1) / bins
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            error += abs(accuracy - sum(value for value, _ in inside) / len(inside)) * len(inside) / len(labels)
    return error


@pytest.mark.parametrize(
    ("images", "classes", "bins", "spread"), [(1, 1, 15, 1), (400, 7, 15, 3), (90, 3, 4, 1), (50, 2, 1, 9)]
)
def test_calibration_error(images: int, classes: int, bins: int, spread: float) -> None:
    torch.manual_seed(images)
    scores, labels = spread * torch.randn(images, classes), torch.randint(classes, (images,))
    probabilities = scores.double().softmax(1)
    expected = calibration_by_definition(probabilities.tolist(), labels.tolist(), bins)
    assert expected_calibration_error(scores, labels, bins) == pytest.approx(expected, abs=1e-12)
    assert expected_calibration_error(probabilities, labels, bins, probabilities=True) == pytest.approx(
        expected, abs=1e-12
    )
    order = torch.randperm(images)
    assert expected_calibration_error(scores[order], labels[order], bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases() -> None:
    certain = torch.eye(4)[[0, 1, 2, 3]]
    assert expected_calibration_error(certain, torch.arange(4), probabilities=True) == 0
    assert expected_calibration_error(certain, torch.tensor([1, 0, 3, 2]), probabilities=True) == 1
    assert expected_calibration_error(certain, torch.tensor([0, 1, 3, 2]), probabilities=True) == 0.5
    half = torch.full((2, 2), 0.5)
    assert expected_calibration_error(half, torch.tensor([0, 1]), probabilities=True) == 0
    low_and_high = torch.tensor([[0.6, 0.4], [0.9, 0.1]])  # one bin each, wrong and right; one bin together
    wrong_right = torch.tensor([1, 0])
    assert expected_calibration_error(low_and_high, wrong_right, 10, probabilities=True) == pytest.approx(
        (0.6 + 0.1) / 2
    )
    assert expected_calibration_error(low_and_high, wrong_right, 1, probabilities=True) == pytest.approx(0.25)


def uncertainty_by_definition(draws: Tensor, kind: str, image: int) -> float:
    rows = [[float(value) for value in draw[image]] for draw in draws]
    soft = [[math.exp(value) / sum(math.exp(other) for other in row) for value in row] for row in rows]
    mean = [sum(column) / len(soft) for column in zip(*soft, strict=True)]
    if kind == "confidence":
        return 1 - max(mean)
    if kind == "entropy":
        return -sum(value * math.log(value) for value in mean)
    if kind == "energy":
        return -math.log(sum(math.exp(sum(column) / len(rows)) for column in zip(*rows, strict=True)))
    columns = list(zip(*soft, strict=True))
    return sum(sum((v - m) ** 2 for v in column) / (len(soft) - 1) for column, m in zip(columns, mean, strict=True))


@pytest.mark.parametrize("kind", ["confidence", "energy", "entropy", "variance"])
def test_uncertainty(kind: Any) -> None:
    """Draws of one image stay with that image."""
    torch.manual_seed(3)
    draws = 3 * torch.randn(4, 9, 5).double()
    found = uncertainty(draws, kind)
    assert found.tolist() == pytest.approx([uncertainty_by_definition(draws, kind, image) for image in range(9)])
    order = torch.randperm(9)
    torch.testing.assert_close(uncertainty(draws[:, order], kind), found[order])
    if kind != "variance":
        torch.testing.assert_close(uncertainty(draws[0], kind), uncertainty(draws[:1], kind))
        certain = torch.tensor([[60.0, 0, 0], [1, 1, 1]])
        assert uncertainty(certain, kind)[0] < uncertainty(certain, kind)[1]


def separation_by_definition(known: list[float], novel: list[float]) -> dict[str, float]:
    """Pairs for the area under the ROC curve; every distinct threshold, highest first, for the rest."""
    pairs = [(one > two) + (one == two) / 2 for one in known for two in novel]
    recall_before, precision_area, false_rate = 0.0, 0.0, None
    for threshold in sorted({*known, *novel}, reverse=True):
        hits = sum(value >= threshold for value in known)
        alarms = sum(value >= threshold for value in novel)
        precision_area += (hits / len(known) - recall_before) * hits / (hits + alarms)
        recall_before = hits / len(known)
        if false_rate is None and 20 * hits >= 19 * len(known):
            false_rate = alarms / len(novel)
    assert false_rate is not None
    return {"auroc": sum(pairs) / len(pairs), "aupr": precision_area, "fpr95": false_rate}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("known", "novel"), [(1, 1), (40, 25), (100, 7), (3, 60), (19, 20), (20, 20)])
def test_separation(known: int, novel: int, ties: bool) -> None:
    torch.manual_seed(known + novel)
    high, low = torch.randn(known) + 1, torch.randn(novel)
    if ties:
        high, low = high.round(), low.round()
    expected = separation_by_definition(high.tolist(), low.tolist())
    assert separation(high, low) == pytest.approx(expected, abs=1e-12)
    assert separation(high.flip(0), low[torch.randperm(novel)]) == separation(high, low)


def test_separation_of_known_cases() -> None:
    high, low = torch.arange(10.0, 20.0), torch.arange(0.0, 10.0)
    assert separation(high, low) == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    assert separation(low, high)["auroc"] == 0.0
    assert separation(low, high)["fpr95"] == 1.0
    blind = separation(torch.zeros(6), torch.zeros(2))  # one threshold: everything ties
    assert blind == {"auroc": 0.5, "aupr": 0.75, "fpr95": 1.0}


def test_novel_data_is_what_no_class_fits() -> None:
    torch.manual_seed(0)
    known = torch.randn(30, 6).scatter_add(1, torch.randint(6, (30, 1)), torch.full((30, 1), 8.0))
    novel = torch.randn(50, 6)
    found = novelty_detection(known, novel, "energy")
    assert found == separation(known.double().logsumexp(1), novel.double().logsumexp(1))
    assert found["auroc"] > 0.95
    assert novelty_detection(novel, known, "entropy")["auroc"] < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: expected_calibration_error(torch.zeros(3), torch.zeros(3).long()),
            r"scores: expected .* got torch.float32 \(3,\)",
        ),
        (
            lambda: expected_calibration_error(torch.zeros(3, 2).long(), torch.zeros(3).long()),
            "scores: expected floating point",
        ),
        (
            lambda: expected_calibration_error(torch.zeros(3, 2), torch.zeros(2).long()),
            r"labels: expected int64 \(3,\), got",
        ),
        (
            lambda: expected_calibration_error(torch.zeros(3, 2), torch.full((3,), 2)),
            "labels: expected 0 to 1, got 2 to 2",
        ),
        (
            lambda: expected_calibration_error(torch.zeros(3, 2), torch.zeros(3).long(), 0),
            "bins: expected a number >= 1, got 0",
        ),
        (
            lambda: expected_calibration_error(torch.full((1, 2), torch.nan), torch.zeros(1).long()),
            "scores: .* some are NaN",
        ),
        (
            lambda: expected_calibration_error(torch.ones(1, 2), torch.zeros(1).long(), probabilities=True),
            "scores: expected probabilities",
        ),
        (
            lambda: uncertainty(torch.zeros(2, 3), "spread"),
            "kind: expected one of confidence, energy, entropy, variance, got 'spread'",
        ),
        (lambda: uncertainty(torch.zeros(4)), r"scores: expected floating point \(N, C\) or \(F, N, C\), got"),
        (
            lambda: uncertainty(torch.zeros(4, 2), "variance"),
            r"variance needs \(F, N, C\) with F >= 2 draws, got \(4, 2\)",
        ),
        (lambda: separation(torch.zeros(0), torch.zeros(2)), r"known: expected \(N,\) with N >= 1, got \(0,\)"),
        (lambda: separation(torch.zeros(1), torch.tensor([torch.nan])), "novel: expected numbers, some are NaN"),
    ],
)
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

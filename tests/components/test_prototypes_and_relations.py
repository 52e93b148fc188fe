"""What MulKI is made of, each against a few lines of plain PyTorch in float64: prototypes, relations, weights of teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.components.prototypes import class_prototypes, follow, symmetric_alignment
from cl_methods.components.relations import relation_distillation, side_by_side
from cl_methods.components.teacher_weights import teacher_weights

LABELS = torch.tensor([2, 0, 2, 2, 4, 0, 4])


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """``T² Σ p_t (log p_t − log p_s)`` of two vectors of logits."""
    p_t, p_s = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p_t * (p_t.log() - p_s.log())).sum()


def test_prototypes_are_means_of_their_class() -> None:
    features, fallback = unit(7, 6), unit(5, 6, seed=1)
    prototypes = class_prototypes(features, LABELS, fallback)
    for label in range(5):
        members = features[label == LABELS]
        expected = F.normalize(members.mean(0), dim=0) if len(members) else fallback[label]
        torch.testing.assert_close(prototypes[label], expected)


@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_prototypes_follow_the_classes_that_a_batch_shows(momentum: float) -> None:
    prototypes, features = unit(5, 6, seed=2), unit(7, 6, seed=3)
    moved = follow(prototypes, features, LABELS, momentum)
    for label in range(5):
        members = features[label == LABELS]
        if len(members) == 0:
            assert torch.equal(moved[label], prototypes[label])
            continue
        mixed = momentum * prototypes[label] + (1 - momentum) * members.mean(0)
        torch.testing.assert_close(moved[label], mixed / mixed.norm())


def test_alignment_is_symmetric_and_differentiable() -> None:
    prototypes, texts = unit(5, 6).requires_grad_(), unit(5, 6, seed=1).requires_grad_()
    logits, own = 9.0 * prototypes @ texts.T, torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(symmetric_alignment(prototypes, texts, 9.0), expected)
    torch.testing.assert_close(symmetric_alignment(texts, prototypes, 9.0), expected)
    assert torch.autograd.gradcheck(lambda p, t: symmetric_alignment(p, t, 9.0), (prototypes, texts))


@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_side_by_side_gives_every_teacher_its_own_anchors(teachers: int) -> None:
    features, anchors = unit(teachers, 7, 6), unit(teachers, 5, 6, seed=1)
    wide, joined = side_by_side(features, anchors)
    torch.testing.assert_close(wide @ joined.T, features @ anchors.mT)


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("columns", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["own anchors", "shared anchors", "among themselves"])
def test_relations(teachers: int, columns: float, kind: str) -> None:
    """Value and gradients in features and anchors, entry by entry in Python."""
    student, feature_sets = unit(7, 6).requires_grad_(), unit(teachers, 7, 6, seed=1)
    themselves = kind == "among themselves"
    anchors = student if themselves else unit(5, 6, seed=2).requires_grad_()
    anchor_sets = feature_sets if themselves else unit(teachers, 5, 6, seed=3)
    if kind == "shared anchors":
        anchor_sets = unit(5, 6, seed=3)
    weights = torch.rand(teachers, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    value = relation_distillation(
        student, anchors, feature_sets, anchor_sets, weights,
        scale=20.0, temperature=1.5, columns=columns, among_themselves=themselves,
    )  # fmt: skip
    expected = student.new_zeros(())
    own = 20.0 * student @ anchors.T
    for k in range(teachers):
        theirs = 20.0 * feature_sets[k] @ (anchor_sets[k] if anchor_sets.dim() == 3 else anchor_sets).T
        for n in range(7):
            keep = torch.arange(own.shape[1]) != (n if themselves else -1)
            expected = expected + weights[k, n] * kl(theirs[n][keep], own[n][keep], 1.5) / 7
        for m in range(own.shape[1]) if columns else ():
            keep = torch.arange(7) != (m if themselves else -1)
            p_t, p_s = (theirs[keep, m] / 1.5).softmax(0), (own[keep, m] / 1.5).softmax(0)
            terms = 1.5**2 * p_t * (p_t.log() - p_s.log())
            expected = expected + columns * (weights[k][keep] * terms).sum() / own.shape[1]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    inputs = [student] if themselves else [student, anchors]
    for gradient, other in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11)


def test_relations_vanish_where_the_teachers_agree_with_the_student() -> None:
    student, anchors = unit(7, 6).requires_grad_(), unit(5, 6, seed=1).requires_grad_()
    sets, weights = student.detach().expand(2, -1, -1), torch.full((2, 7), 0.5, dtype=torch.float64)
    value = relation_distillation(
        student, anchors, sets, anchors.detach(), weights, scale=50.0, temperature=2.0, columns=1.0
    )
    assert value.detach().abs() < 1e-12
    for gradient in torch.autograd.grad(value, [student, anchors]):
        assert gradient.abs().max() < 1e-12


OPTIONS: dict[str, Any] = {"temperature": 0.3, "threshold": 0.5, "sharpness": 4.0}


@pytest.mark.parametrize("kind", ["confidence", "entropy", "discrepancy", "equal"])
def test_weights_of_two_teachers(kind: Any) -> None:
    features, labels = unit(2, 7, 6), LABELS
    logits = 8 * torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = teacher_weights(kind, features, logits, labels, **OPTIONS)
    chances = logits.softmax(-1)
    for n in range(7):
        if kind == "confidence":
            scores = torch.stack([chances[k, n, labels[n]] for k in range(2)]) / 0.3
        elif kind == "entropy":
            scores = torch.stack([(chances[k, n] * chances[k, n].log()).sum() for k in range(2)]) / (
                0.3 * torch.tensor(5.0).double().log()
            )
        elif kind == "discrepancy":
            scores = torch.stack([torch.zeros(()).double(), 4.0 * ((features[0, n] - features[1, n]).norm() - 0.5)])
        else:
            scores = torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(weights[:, n], scores.softmax(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["confidence", "entropy", "discrepancy", "equal"])
def test_a_teacher_alone_weighs_one(kind: Any) -> None:
    weights = teacher_weights(kind, unit(1, 7, 6), torch.randn(1, 7, 5), LABELS, **OPTIONS)
    assert torch.equal(weights, torch.ones(1, 7, dtype=torch.float64))


def test_the_teacher_that_is_right_is_believed() -> None:
    logits = torch.zeros(2, 1, 3)
    logits[0, 0, 1], logits[1, 0, 2] = 9.0, 9.0
    options = {**OPTIONS, "temperature": 0.1}
    weights = teacher_weights("confidence", torch.zeros(2, 1, 4), logits, torch.tensor([2]), **options)
    assert weights[1, 0] > 0.99
    same = teacher_weights("entropy", torch.zeros(2, 1, 4), logits, torch.tensor([2]), **options)
    torch.testing.assert_close(same, torch.full((2, 1), 0.5))

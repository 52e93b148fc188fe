"""The definition against formulas written out by hand, its gradients, its chunks, and what the public functions refuse."""

from __future__ import annotations

import math

import distill_cases as cases
import pytest
import torch

import cl_kernels as clk
from cl_kernels.distill_kl import reference


def by_hand(student, teacher, T, kl):
    """One slice, with Python's numbers."""
    loss = 0.0
    total_s = sum(math.exp(s / T) for s in student)
    total_t = sum(math.exp(t / T) for t in teacher)
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = math.exp(s / T) / total_s, math.exp(t / T) / total_t
        loss += p_t * ((math.log(p_t) if kl else 0) - math.log(p_s))
    return T * T * loss


@pytest.mark.parametrize("target", ["cross_entropy", "kl"])
@pytest.mark.parametrize("T", [1.0, 2.0, 0.7])
def test_logits_by_hand(T, target):
    student, teacher = (t.double() for t in cases.logits((3, 5)))
    rows = [by_hand(s, t, T, target == "kl") for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    columns = [by_hand(s, t, T, target == "kl") for s, t in zip(student.T.tolist(), teacher.T.tolist(), strict=True)]
    for dim, expected in ((-1, rows), (0, columns)):
        loss = clk.distill_kl(
            student, teacher, temperature=T, dim=dim, target=target, reduction="none", backend="reference"
        )
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("target", ["cross_entropy", "kl"])
def test_features_by_hand(target):
    student, teacher, anchors, keywords = cases.in_float64(*cases.features(4, 6, 3, K=2, own=1, weighted=True))
    w, T, scale, kl = keywords["sample_weight"], 2.0, 7.0, target == "kl"
    z_s = (scale * student @ anchors.T).tolist()
    expected = 0.0
    for k in range(2):
        z_t = (scale * teacher[k] @ keywords["teacher_anchors"].T).tolist()
        for n in range(4):
            expected += 0.7 / 4 * w[k, n].item() * by_hand(z_s[n], z_t[n], T, kl)
        for m in range(6):
            column_s, column_t = [row[m] for row in z_s], [row[m] for row in z_t]
            total_s, total_t = (sum(math.exp(z / T) for z in c) for c in (column_s, column_t))
            for n in range(4):
                p_s, p_t = math.exp(column_s[n] / T) / total_s, math.exp(column_t[n] / T) / total_t
                term = p_t * ((math.log(p_t) if kl else 0) - math.log(p_s))
                expected += 1.3 / 6 * T * T * w[k, n].item() * term
    keywords |= {"rows": 0.7, "columns": 1.3, "target": target, "logit_scale": scale, "backend": "reference"}
    assert clk.feature_distill_kl(student, teacher, anchors, **keywords).item() == pytest.approx(expected, rel=1e-12)


def test_features_are_the_two_directions_of_their_logits():
    student, teacher, anchors, _ = cases.features(9, 13, 5)
    z_s, z_t = 20 * student @ anchors.T, 20 * teacher @ anchors.T
    both = clk.distill_kl(z_s, z_t, dim=-1, backend="reference") + clk.distill_kl(z_s, z_t, dim=-2, backend="reference")
    loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=20.0, backend="reference")
    torch.testing.assert_close(loss, both)


@pytest.mark.parametrize("case", cases.FEATURES, ids=str)
def test_chunks_change_nothing(case, monkeypatch):
    given = cases.in_float64(*cases.features(**case))
    whole = cases.feature_gradients(*given, "reference")
    monkeypatch.setattr(reference, "CHUNK", 1)  # 64 columns at a time
    for a, b in zip(cases.feature_gradients(*given, "reference"), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_many_columns_are_not_held(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 1)
    cases.check_memory("reference", 40, 1500)


def test_gradcheck():
    student, teacher = (t.double() for t in cases.logits((3, 4, 2)))
    for target in ("cross_entropy", "kl"):
        assert torch.autograd.gradcheck(
            lambda s, target=target: clk.distill_kl(s, teacher, dim=1, target=target, backend="reference"),
            student.requires_grad_(),
        )
    student, teacher, anchors, keywords = cases.in_float64(*cases.features(4, 4, 3, K=2, own=1, weighted=True))
    keywords |= {"logit_scale": 4.0, "mask_diagonal": True, "backend": "reference"}
    leaves = student.requires_grad_(), anchors.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, a: clk.feature_distill_kl(s, teacher, a, **keywords), leaves)


def test_scale_reaches_the_student_only():
    student, teacher, anchors, _ = cases.in_float64(*cases.features(4, 6, 3))
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=scale, backend="reference")
    z_s, z_t = scale * student @ anchors.T, 4.0 * teacher @ anchors.T
    by_logits = clk.distill_kl(z_s, z_t, backend="reference") + clk.distill_kl(z_s, z_t, dim=0, backend="reference")
    torch.testing.assert_close(*(torch.autograd.grad(value, scale)[0] for value in (loss, by_logits)))


def test_teachers_are_never_differentiated():
    student, teacher = (t.requires_grad_() for t in cases.logits((3, 4)))
    clk.distill_kl(student, teacher, backend="reference").backward()
    assert teacher.grad is None
    student, teacher, anchors, _ = cases.features(3, 4, 2)
    teacher.requires_grad_()
    own = anchors.clone().requires_grad_()
    loss = clk.feature_distill_kl(
        student.requires_grad_(), teacher, anchors, teacher_anchors=own, logit_scale=2.0, backend="reference"
    )
    loss.backward()
    assert teacher.grad is None
    assert own.grad is None


def test_extremes():
    cases.check_extremes("reference")


def test_nothing_to_average():
    empty = torch.zeros(0, 4)
    assert clk.distill_kl(empty, empty, backend="reference").isnan()
    assert clk.distill_kl(empty, empty, reduction="sum", backend="reference") == 0
    assert clk.distill_kl(empty, empty, reduction="none", backend="reference").shape == (0,)


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    [
        ((Z(3, 4), Z(3, 5)), {}, ValueError, ["teacher_logits", "(3, 5)", "(3, 4)"]),
        ((Z(3, 4), [1.0]), {}, TypeError, ["teacher_logits", "list"]),
        ((Z(3, 4, dtype=torch.int64), Z(3, 4)), {}, TypeError, ["student_logits", "int64"]),
        ((Z(3, 4), Z(3, 4)), {"dim": 2}, ValueError, ["dim", "2", "(3, 4)"]),
        ((Z(()), Z(())), {}, ValueError, ["dim", "()"]),
        ((Z(3, 0), Z(3, 0)), {}, ValueError, ["student_logits", "(3, 0)"]),
        ((Z(3, 4), Z(3, 4, device="meta")), {}, ValueError, ["teacher_logits", "meta", "cpu"]),
        ((Z(3, 4), Z(3, 4)), {"temperature": 0.0}, ValueError, ["temperature", "0.0"]),
        ((Z(3, 4), Z(3, 4)), {"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
        ((Z(3, 4), Z(3, 4)), {"target": "js"}, ValueError, ["target", "'js'", "kl"]),
        ((Z(3, 4), Z(3, 4)), {"reduction": "avg"}, ValueError, ["reduction", "'avg'", "mean"]),
        ((Z(3, 4), Z(3, 4)), {"sample_weight": Z(4)}, ValueError, ["sample_weight", "(4,)", "(3,)"]),
        ((Z(3, 4), Z(3, 4)), {"sample_weight": Z(1, 3)}, ValueError, ["sample_weight", "(1, 3)", "(3,)"]),
        ((Z(3, 4), Z(3, 4)), {"backend": "gpu"}, ValueError, ["backend", "'gpu'"]),
    ],
)
def test_logits_that_do_not_fit(arguments, keywords, error, words):
    with pytest.raises(error) as raised:
        clk.distill_kl(*arguments, **keywords)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("shapes", "keywords", "words"),
    [
        (((3, 4), (3, 4), (5, 6)), {}, ["anchors", "(5, 6)", "(3, 4)"]),
        (((3, 4), (2, 4), (5, 4)), {}, ["teacher", "(2, 4)", "(3, 4)"]),
        (((3, 4), (2, 2, 4), (5, 4)), {}, ["teacher", "(2, 2, 4)", "(3, 4)"]),
        (((3, 4), (3, 6), (5, 4)), {}, ["teacher", "(3, 6)", "teacher_anchors"]),
        (((3, 4), (3, 6), (5, 4)), {"teacher_anchors": Z(4, 6)}, ["teacher_anchors", "(4, 6)", "(5, 4)"]),
        (((4,), (3, 4), (5, 4)), {}, ["student", "(4,)"]),
        (((0, 4), (0, 4), (5, 4)), {}, ["student", "(0, 4)"]),
        (((3, 4), (3, 4), (0, 4)), {}, ["anchors", "(0, 4)"]),
        (((3, 4), (2, 3, 4), (5, 4)), {"sample_weight": Z(3, 2)}, ["sample_weight", "(3, 2)", "(2, 3)"]),
        (((3, 4), (3, 4), (5, 4)), {"rows": float("inf")}, ["rows", "inf"]),
        (((3, 4), (3, 4), (5, 4)), {"logit_scale": Z(2)}, ["logit_scale", "(2,)"]),
        (((3, 4), (3, 4), (5, 4)), {"target": "l2"}, ["target", "'l2'"]),
        (((3, 4), (3, 4), (5, 4)), {"temperature": -1.0}, ["temperature", "-1.0"]),
    ],
)
def test_features_that_do_not_fit(shapes, keywords, words):
    with pytest.raises(ValueError, match=words[0]) as raised:
        clk.feature_distill_kl(*(Z(s) for s in shapes), **({"logit_scale": 1.0} | keywords))
    assert all(word in str(raised.value) for word in words), raised.value

"""ZSCL: what each switch adds, what is computed only once, and that a state in the middle of a task is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_clip import build_backbone
from torch import Tensor
from torch.nn import functional as F

import cl_kernels as clk
from cl_methods.backbone import Backbone
from cl_methods.components.reference_features import FrozenFeatures, random_texts
from cl_methods.components.weights import consolidation_value, fold_consolidation_gradient
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import ZSCL, Batch
from cl_methods.methods.zscl_config import ZSCLConfig
from cl_methods.training.loop import train_on_batches

Batches = Callable[..., list[Batch]]
OFF: dict[str, Any] = {"image_loss": False, "text_loss": False, "consolidation": 0.0, "ensemble": "none"}
SHORT: dict[str, Any] = {"lr": 1e-3, "iterations": 3, "warmup": 1}


def build(reference: Reference | None, **switches: Any) -> ZSCL:
    return ZSCL(build_backbone(), ZSCLConfig(**{**SHORT, **switches}), reference)


def train(method: ZSCL, batches: list[Batch], start: int = 0, optimizer: Any = None) -> torch.optim.Optimizer:
    """Steps ``start … start + len(batches) - 1`` of a task of ``iterations + 1`` steps."""
    last = start + len(batches) - 1
    config = method.config
    assert last <= config.iterations
    return train_on_batches(
        method,
        batches,
        iterations=last,
        warmup=config.warmup,
        lr=config.lr,
        seed=0,
        task_index=0,
        start_step=start,
        optimizer=optimizer,
    )


def weights(method: ZSCL) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.trainable()}


@pytest.mark.parametrize(
    ("switches", "terms"),
    [
        ({}, set()),
        ({"image_loss": True}, {"distillation"}),
        ({"text_loss": True}, {"distillation"}),
        ({"text_tower_loss": True}, {"text_tower"}),
        ({"feature_mse": True}, {"feature_mse"}),
        ({"relation_loss": True}, {"relation"}),
        ({"consolidation": 2.0}, {"consolidation"}),
    ],
)
def test_switches_add_their_term(
    switches: dict[str, Any], terms: set[str], tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    method = build(reference, **{**OFF, **switches})
    method.before_task(0, tasks[0])
    with torch.no_grad():  # away from the start, where some terms are zero
        for value in method.backbone.model.visual.parameters():
            value.mul_(1.05)
    logged = method.loss(batches(0, 1)[0])
    assert logged.keys() == {"loss", "cross_entropy", *terms}
    factor = {"consolidation": 2.0}
    total = sum(factor.get(name, 1.0) * value for name, value in logged.items() if name != "loss")
    torch.testing.assert_close(logged["loss"], total)
    assert all(logged[name] > 0 for name in terms)


def test_only_the_text_tower_loss_reaches_the_text_tower(
    tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    for switches, term, holds_texts in (
        ({"image_loss": True, "text_loss": True}, "distillation", False),
        ({"text_tower_loss": True, "text_batch_size": 3}, "text_tower", True),
    ):
        method = build(reference, **{**OFF, **switches})
        method.before_task(0, tasks[0])
        with torch.no_grad():
            for value in method.backbone.model.parameters():
                value.add_(0.05 * torch.randn(value.shape))
        term_value = method.loss(batches(0, 1)[0])[term]
        model = method.backbone.model
        towers = {"images": model.visual.proj, "texts": model.text_projection}
        gradients = torch.autograd.grad(term_value, list(towers.values()), allow_unused=True)
        reached = {name for name, gradient in zip(towers, gradients, strict=True) if gradient is not None}
        assert reached == ({"texts"} if holds_texts else {"images"})


def test_the_text_tower_loss_vanishes_at_the_teacher(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference, **{**OFF, "text_tower_loss": True})
    method.before_task(0, tasks[0])
    term = method.loss(batches(0, 1)[0])["text_tower"]
    gradient = torch.autograd.grad(term, [method.backbone.model.text_projection])[0]
    assert gradient.abs().max() < 1e-5  # the cross-entropy keeps the teacher's entropy, its gradient is zero


def test_both_directions_and_their_weight(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    batch, values = batches(0, 1)[0], {}
    for name, switches in {
        "rows": {"image_loss": True},
        "columns": {"text_loss": True},
        "half": {"image_loss": True, "text_loss": True, "distillation_weight": 0.5},
    }.items():
        method = build(reference, **{**OFF, **switches})
        method.before_task(0, tasks[0])
        values[name] = method.loss(batch)["distillation"]
    torch.testing.assert_close(values["half"], 0.5 * (values["rows"] + values["columns"]))


def test_one_student_pass_equals_two(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    """The merged batch gives the cross-entropy and distillation of separate passes."""
    method, batch = build(reference, **{**OFF, "image_loss": True, "text_loss": True}), batches(0, 1)[0]
    method.before_task(0, tasks[0])
    logged = method.loss(batch)
    backbone = method.backbone
    texts = backbone.encode_texts(backbone.tokenize([f"a photo of {name}" for name in tasks[0].class_names]))
    scores = backbone.logit_scale * backbone.encode_images(batch.images) @ texts.T
    torch.testing.assert_close(
        logged["cross_entropy"], F.cross_entropy(scores, batch.labels, label_smoothing=0.2), rtol=1e-5, atol=1e-6
    )
    teacher = build_backbone()
    captions = teacher.frozen_text_features(teacher.tokenize(reference.captions))
    alone = clk.feature_distill_kl(
        backbone.encode_images(batch.reference_images),
        teacher.encode_images(batch.reference_images).detach(),
        captions,
        logit_scale=float(backbone.logit_scale.detach()),
        temperature=2.0,
    )
    torch.testing.assert_close(logged["distillation"], alone, rtol=1e-5, atol=1e-6)


class Calls:
    """Counts rows that go through the towers of frozen backbones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.texts = 0
        for name in ("encode_images", "encode_texts"):
            monkeypatch.setattr(Backbone, name, self._counting(getattr(Backbone, name), name.split("_")[1]))

    def _counting(self, original: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
        def call(backbone: Backbone, rows: Tensor, **options: Any) -> Tensor:
            if not next(backbone.model.parameters()).requires_grad:
                setattr(self, kind, getattr(self, kind) + len(rows))
            return original(backbone, rows, **options)

        return call


@pytest.mark.parametrize(
    ("switches", "texts_per_task", "texts_once"),
    [
        ({}, 0, 4),
        ({"teacher": "previous"}, 4, 0),
        ({"reference_texts": "classes"}, None, 0),
    ],
)
def test_teacher_features_are_computed_once(
    switches: dict[str, Any],
    texts_per_task: int | None,
    texts_once: int,
    tasks: list[Task],
    reference: Reference,
    batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts once per teacher, images once per image: 4 batches of 4 show 12 different reference images."""
    method, calls = build(reference, **switches), Calls(monkeypatch)
    for index, task in enumerate(tasks):
        method.before_task(index, task)
        train(method, batches(index, 4))
        method.after_task(index, task)
    expected = (
        sum(len(task.class_names) for task in tasks) if texts_per_task is None else 2 * texts_per_task + texts_once
    )
    assert calls.texts == expected
    assert calls.images == (12 if method.config.teacher == "zero_shot" else 24)


def test_cached_features_are_those_of_the_image() -> None:
    cache = FrozenFeatures(lambda images: images.flatten(1)[:, :3], torch.device("cpu"))
    images = torch.randn(6, 3, 2, 2)
    for rows in ([0, 1, 2], [2, 2, 5], [5, 4, 0], [3, 3, 1]):
        torch.testing.assert_close(cache.get(images[rows], torch.tensor(rows)), images[rows].flatten(1)[:, :3])
    assert len(cache) == 6
    copy = FrozenFeatures(lambda images: images, torch.device("cpu"))
    copy.load_state_dict(cache.state_dict())
    rows = torch.tensor([4, 0])
    assert torch.equal(copy.get(images[rows], rows), cache.get(images[rows], rows))


def test_consolidation_in_closed_form() -> None:
    """Value and gradient equal those of autograd."""
    torch.manual_seed(0)
    names = [("a", torch.nn.Parameter(torch.randn(3, 4))), ("b", torch.nn.Parameter(torch.randn(5)))]
    anchor = {name: torch.randn_like(value) for name, value in names}
    penalty = sum((value - anchor[name]).square().sum() for name, value in names)
    (0.7 * penalty).backward()
    expected = [value.grad for _, value in names]
    for _, value in names:
        value.grad = torch.ones_like(value)
    fold_consolidation_gradient(names, anchor, 0.7)
    torch.testing.assert_close(consolidation_value(names, anchor), penalty.detach())
    for gradient, (_, value) in zip(expected, names, strict=True):
        torch.testing.assert_close(value.grad, gradient + 1)


def test_ensemble_is_the_mean_of_start_and_snapshots(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference, average_every=2)
    method.before_task(0, tasks[0])
    seen = [weights(method)]
    original = method.after_step

    def noting(step: int) -> None:
        if step in (0, 2):
            seen.append(weights(method))
        original(step)

    method.after_step = noting  # type: ignore[method-assign]
    train(method, batches(0, 4))
    method.after_task(0, tasks[0])
    for name, value in weights(method).items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in seen]).mean(dim=0), rtol=1e-5, atol=1e-6)


def test_wise_merge_interpolates(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference, **{**OFF, "wise_merge": "zero_shot", "wise_merge_alpha": 0.25})
    start = weights(method)
    method.before_task(0, tasks[0])
    train(method, batches(0, 4))
    last = weights(method)
    method.after_task(0, tasks[0])
    for name, value in weights(method).items():
        torch.testing.assert_close(value, 0.25 * last[name] + 0.75 * start[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"teacher": "mixed", "ensemble": "wise", "average_every": 1},
        {"teacher": "previous", "reference_texts": "random", "moving_average": "previous", "average_every": 1},
    ],
)
def test_a_state_in_the_middle_of_a_task_is_complete(
    switches: dict[str, Any], tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    """A new instance with the state of step 2 of task 1 ends with the same weights to the bit."""
    ends = []
    for resumed in (False, True):
        method = build(reference, **switches)
        method.before_task(0, tasks[0])
        train(method, batches(0, 4))
        method.after_task(0, tasks[0])
        between = {name: value.clone() for name, value in method.state_dict().items()}
        steps = batches(1, 4)
        method.before_task(1, tasks[1])
        optimizer = train(method, steps[:2])
        if resumed:
            middle = {name: value.clone() for name, value in method.state_dict().items()}
            moments, method = optimizer.state_dict(), build(reference, **switches)
            method.load_state_dict(between)
            method.before_task(1, tasks[1])
            method.load_state_dict(middle)
            optimizer = method.optimizer()
            optimizer.load_state_dict(moments)
        train(method, steps[2:], 2, optimizer)
        method.after_task(1, tasks[1])
        ends.append(weights(method))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_random_texts_are_fixed_and_end_where_they_should() -> None:
    backbone = build_backbone()
    texts = random_texts(backbone, count=50, length=6)
    assert torch.equal(texts, random_texts(backbone, count=50, length=6))
    assert (texts[:, 0] == 1).all()
    assert (texts.argmax(dim=1) == 7).all()
    assert (texts[:, 1:7] > 1).all()
    with pytest.raises(ValueError, match="length: expected at most 10 tokens"):
        random_texts(backbone, length=11)


def test_logit_scale_does_not_train(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference)
    before = method.backbone.logit_scale.clone()
    method.before_task(0, tasks[0])
    train(method, batches(0, 4))
    assert "logit_scale" not in dict(method.trainable())
    assert torch.equal(method.backbone.logit_scale, before)


def test_no_distillation_gradient_reaches_the_text_tower(
    tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    method = build(reference)
    method.before_task(0, tasks[0])
    method.loss(batches(0, 1)[0])["distillation"].backward()
    assert method.backbone.model.visual.proj.grad.abs().sum() > 0
    assert method.backbone.model.text_projection.grad is None


@pytest.mark.parametrize("name", sorted(ZSCLConfig.presets))
def test_presets_train(name: str, tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = ZSCL(build_backbone(), ZSCLConfig.preset(name, **SHORT, average_every=2), reference)
    start = weights(method)
    method.before_task(0, tasks[0])
    train(method, batches(0, 4))
    method.after_task(0, tasks[0])
    assert any(not torch.equal(value, start[key]) for key, value in weights(method).items())
    assert method.uses_reference == (name in ("zscl", "zscl_star", "lwf", "lwf_vr"))
    expected = tasks[0].train if name.startswith("lwf") else reference.images if method.uses_reference else None
    assert method.reference_source(tasks[0]) is expected


def test_what_is_missing_is_said(reference: Reference, tasks: list[Task], batches: Batches) -> None:
    with pytest.raises(ValueError, match=r"no reference set to distil on .*_reference.*; set reference_images='task'"):
        build(None)
    with pytest.raises(ValueError, match="no captions; expected 'random' or 'classes'"):
        build(Reference(reference.images, ()))
    with pytest.raises(ValueError, match="teacher: expected one of zero_shot, previous, mixed, got 'me'"):
        build(reference, teacher="me")
    with pytest.raises(ValueError, match="wise_merge: the ensemble replaces"):
        build(reference, wise_merge="start")
    with pytest.raises(ValueError, match="average_every: expected a number > 0, got 0"):
        build(reference, average_every=0)
    method = build(reference)
    method.before_task(0, tasks[0])
    first = batches(0, 1)[0]
    with pytest.raises(ValueError, match="batch: expected reference_images, got None"):
        method.loss(Batch(first.images, first.labels, 0))

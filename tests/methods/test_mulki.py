"""MulKI: its whole loss in float64, each stage off, what teachers are asked, resuming, and that nothing waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import encoded_by_frozen
from tiny_clip import build_backbone, transform
from torch import Tensor
from torch.nn import functional as F
from trained import SHORT, check_resuming, learn, state, train, weights

from cl_kernels.profile import OperationCount
from cl_kernels.profile.waiting import READS
from cl_methods.backbone import Backbone
from cl_methods.components.teacher_weights import teacher_weights
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.mulki import MulKI
from cl_methods.methods.mulki_config import MulKIConfig

Batches = Callable[..., list[Batch]]
OFF: dict[str, Any] = {
    "alignment_weight": 0.0,
    "feature_weight": 0.0,
    "relation_weight": 0.0,
    "average_every": 0,
    "inter_task_share": 1.0,
}
EVERYTHING: dict[str, Any] = {
    "alignment_weight": 0.7,
    "feature_weight": 1.3,
    "relation_weight": 0.9,
    "image_prototype_relation": True,
    "image_image_relation": True,
    "image_text_relation": True,
    "prototype_text_relation": True,
    "relation_columns": 0.4,
    "teacher_view": "batch",
    "average_every": 2,
    "inter_task_share": 0.75,
}


def build(**settings: Any) -> MulKI:
    return MulKI(build_backbone(), MulKIConfig(**{**SHORT, **EVERYTHING, **settings}))


@pytest.fixture
def indexed(batches: Batches, tasks: list[Task]) -> Batches:
    """The same batches, which also say which images they hold."""

    def make(index: int = 0, steps: int = 4) -> list[Batch]:
        size = len(tasks[index].train)
        return [
            dataclasses.replace(batch, indices=torch.arange(6 * step, 6 * step + 6) % size)
            for step, batch in enumerate(batches(index, steps))
        ]

    return make


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """``T² KL`` of every row at T = 2."""
    p_t, p_s = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    return 4 * (p_t * (p_t.log() - p_s.log())).sum(-1)


def both_ways(teacher: Tensor, student: Tensor, weight: Tensor, columns: float) -> Tensor:
    """Rows weighed by ``weight`` (N,), and the other direction, whose summands belong to the same samples."""
    p_t, p_s = (teacher / 2).softmax(0), (student / 2).softmax(0)
    other = 4 * (weight[:, None] * p_t * (p_t.log() - p_s.log())).sum(0).mean()
    return (weight * divergence(teacher, student)).mean() + columns * other


def plain_terms(method: MulKI, batch: Batch, task: Task, teachers: list[Backbone], views: Tensor) -> dict[str, Tensor]:
    """The terms of a step of :data:`EVERYTHING` from separate passes; ``views`` is what the teachers see of the batch."""
    config, model, scale = method.config, method.backbone, method._scale
    prompts = [f"a photo of {name}" for name in task.class_names]
    texts = model.encode_texts(model.tokenize(prompts))
    features, labels = model.encode_images(batch.images), batch.labels
    assert method.prototypes is not None
    prototypes = F.normalize(method.prototypes, dim=1)
    if config.prototype_update == "ema":
        shown = [features[labels == label] for label in range(len(texts))]
        mixed = [0.9 * old + 0.1 * new.mean(0) if len(new) else old for old, new in zip(prototypes, shown, strict=True)]
        prototypes = F.normalize(torch.stack(mixed), dim=1)
    with torch.no_grad():
        their_texts = torch.stack([teacher.encode_texts(teacher.tokenize(prompts)) for teacher in teachers])
        theirs = torch.stack([teacher.encode_images(views) for teacher in teachers])
        shares = teacher_weights(
            config.teacher_weighting,
            theirs,
            scale * theirs @ their_texts.mT,
            labels,
            temperature=config.weighting_temperature,
            threshold=config.threshold,
            sharpness=config.sharpness,
        )
    own = torch.arange(len(texts))
    logits = scale * prototypes @ texts.T
    aligned = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    zero = features.new_zeros(())
    found = {"feature": zero, "image_prototype": zero, "image_image": zero, "image_text": zero, "prototype_text": zero}
    others = ~torch.eye(len(features), dtype=torch.bool)
    for weight, f, t in zip(shares, theirs, their_texts, strict=True):
        moved = (features - f).norm(dim=1) ** (2 if config.feature_distance == "squared" else 1)
        found["feature"] = found["feature"] + (weight * moved).mean()
        pairs = scale * f @ prototypes.detach().T, scale * features @ prototypes.T
        found["image_prototype"] = found["image_prototype"] + both_ways(*pairs, weight, 0.4)
        pairs = scale * f @ t.T, scale * features @ texts.T
        found["image_text"] = found["image_text"] + both_ways(*pairs, weight, 0.4)
        rows = [matrix[others].view(len(f), -1) for matrix in (scale * f @ f.T, scale * features @ features.T)]
        found["image_image"] = found["image_image"] + (weight * divergence(*rows)).mean()
        rows = [scale * prototypes.detach() @ t.T, logits]
        found["prototype_text"] = found["prototype_text"] + weight.mean() * divergence(*rows).mean()
    factors = dict.fromkeys(found, 0.9) | {"feature": 1.3}
    return {
        "cross_entropy": F.cross_entropy(scale * features @ texts.T, labels, label_smoothing=0.2),
        "alignment": 0.7 * aligned,
        **{name: factors[name] * value for name, value in found.items()},
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"teacher_weighting": "entropy", "feature_distance": "norm"},
        {"teacher_weighting": "discrepancy", "prototype_update": "learnable"},
        {"teacher_weighting": "equal", "teacher_view": "evaluation", "prototype_update": "fixed"},
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_loss_and_gradient_in_float64(
    settings: dict[str, Any], index: int, tasks: list[Task], indexed: Batches
) -> None:
    method = build(**settings)
    learn(method, tasks[:index], indexed)
    for model in (method.backbone.model, method.teachers.pretrained.model):
        model.double()
    for backbone in (method.backbone, method.teachers.pretrained):
        backbone.eval_transform = lambda image: transform(image).double()
    task, batch = tasks[index], indexed(index, 1)[0]
    batch = dataclasses.replace(batch, images=batch.images.double())
    method._scale = float(method.backbone.logit_scale.detach())
    method.before_task(index, task)
    first = build_backbone()
    first.model.double()
    teachers = [first, *([method.backbone.frozen_copy()] if index else [])]
    torch.manual_seed(0)
    with torch.no_grad():
        for _, value in method.trainable():
            value.add_(0.05 * torch.randn(value.shape))
    logged = method.loss(batch)
    parameters = [value for _, value in method.trainable()]
    expected = plain_terms(method, batch, task, teachers, batch.images)
    assert logged.keys() == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        assert value > 0
    total = torch.stack(list(expected.values())).sum()
    torch.testing.assert_close(logged["loss"], total, rtol=1e-8, atol=1e-10)
    gradients = torch.autograd.grad(logged["loss"], parameters, allow_unused=True)
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("on", "terms"),
    [
        ({}, set()),
        ({"alignment_weight": 1.0}, {"alignment"}),
        ({"feature_weight": 1.0}, {"feature"}),
        ({"relation_weight": 1.0}, {"image_prototype", "image_image", "image_text", "prototype_text"}),
        (
            {"relation_weight": 1.0, "image_prototype_relation": False, "image_image_relation": False},
            {"image_text", "prototype_text"},
        ),
        (
            {"relation_weight": 1.0, "image_text_relation": False, "prototype_text_relation": False},
            {"image_prototype", "image_image"},
        ),
        ({"relation_weight": 1.0, "text_tower": "frozen"}, {"image_prototype", "image_image", "image_text"}),
    ],
)
def test_switches_add_their_terms(on: dict[str, Any], terms: set[str], tasks: list[Task], indexed: Batches) -> None:
    method = build(**{**OFF, **on})
    method.before_task(0, tasks[0])
    assert method.loss(indexed(0, 1)[0]).keys() == {"loss", "cross_entropy", *terms}
    assert (method.prototypes is not None) == bool(terms & {"alignment", "image_prototype", "prototype_text"})


def test_without_its_stages_it_is_fine_tuning(tasks: list[Task], indexed: Batches) -> None:
    method = learn(build(**OFF), tasks, indexed)
    plain = learn(METHODS["finetune"](build_backbone(), METHODS["finetune"].Config(**SHORT)), tasks, indexed)
    other = weights(plain)
    for name, value in weights(method).items():
        assert torch.equal(value, other[name]), name


def test_a_frozen_text_tower_keeps_its_weights(tasks: list[Task], indexed: Batches) -> None:
    """All else trains as before, and class texts are those of any teacher."""
    method = build(text_tower="frozen")
    before = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    learn(method, tasks, indexed)
    after = method.backbone.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == {name for name, value in method.trainable() if not torch.equal(before[name], value)}
    assert moved
    assert all(name.startswith("visual.") for name in moved)
    method.before_task(1, tasks[1])
    batch = indexed(1, 1)[0]
    texts = method.backbone.encode_texts(method._texts, trimmed=True)
    logits = method.backbone.logit_scale * method.backbone.encode_images(batch.images) @ texts.T
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    torch.testing.assert_close(method.loss(batch)["cross_entropy"], expected)


def test_alignment_reaches_the_image_tower_through_the_prototypes(tasks: list[Task], indexed: Batches) -> None:
    method = build(**{**OFF, "alignment_weight": 1.0})
    method.before_task(0, tasks[0])
    term = method.loss(indexed(0, 1)[0])["alignment"]
    model = method.backbone.model
    for gradient in torch.autograd.grad(term, [model.visual.proj, model.text_projection]):
        assert gradient.abs().max() > 0


def test_prototypes_start_with_the_pretrained_model_and_follow_the_student(tasks: list[Task], indexed: Batches) -> None:
    method = learn(build(), tasks[:1], indexed)
    assert method.prototypes is None
    method.before_task(1, tasks[1])
    images = torch.stack([transform(tasks[1].train.image(index)) for index in range(24)])
    features, labels = build_backbone().encode_images(images).detach(), tasks[1].train.labels
    means = F.normalize(torch.stack([features[labels == label].mean(0) for label in range(2)]), dim=1)
    torch.testing.assert_close(method.prototypes, means)
    step = indexed(1, 1)[0]
    with torch.no_grad():
        shown = method.backbone.encode_images(step.images)
    train(method, [step])
    for label in range(2):
        mixed = 0.9 * means[label] + 0.1 * shown[step.labels == label].mean(0)
        torch.testing.assert_close(method.prototypes[label], mixed / mixed.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("update", "moves"), [("fixed", False), ("learnable", True)])
def test_fixed_and_learnable_prototypes(update: str, moves: bool, tasks: list[Task], indexed: Batches) -> None:
    method = build(prototype_update=update)
    method.before_task(0, tasks[0])
    assert method.prototypes is not None
    start = method.prototypes.detach().clone()
    assert ("prototypes" in dict(method.trainable())) == moves
    train(method, indexed(0, 4))
    assert torch.equal(method.prototypes, start) != moves
    method.after_task(0, tasks[0])
    assert "prototypes" not in dict(method.trainable())


@pytest.mark.parametrize("share", [1.0, 0.75])
@pytest.mark.parametrize("every", [0, 2])
def test_models_are_connected_within_and_between_tasks(
    every: int, share: float, tasks: list[Task], indexed: Batches
) -> None:
    method = learn(build(average_every=every, inter_task_share=share), tasks[:1], indexed)
    method.before_task(1, tasks[1])
    start = weights(method)
    seen = []
    original = method.after_step

    def noting(step: int) -> None:
        seen.append(weights(method))
        original(step)

    method.after_step = noting  # type: ignore[method-assign]
    train(method, indexed(1, 4))
    method.after_task(1, tasks[1])
    taken = [start, seen[0], seen[2]] if every else [seen[-1]]
    for name, value in weights(method).items():
        mean = torch.stack([one[name] for one in taken]).mean(dim=0)
        torch.testing.assert_close(value, share * mean + (1 - share) * start[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "images"),
    [
        ({}, (24 + 4 * 6) + (24 + 4 * 12)),  # prototypes, then one or two teachers per step
        ({"teacher_view": "evaluation"}, 24 + 2 * 24),
        ({**OFF, "alignment_weight": 1.0}, 24 + 24),
        ({**OFF, "feature_weight": 1.0}, 4 * 6 + 4 * 12),
        (OFF, 0),
    ],
)
def test_teachers_are_asked_no_more_than_needed(
    settings: dict[str, Any], images: int, tasks: list[Task], indexed: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(**settings)
    read = encoded_by_frozen(monkeypatch)
    learn(method, tasks, indexed)
    assert read == {"images": images, "texts": 3 + 2 * 2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"prototype_update": "learnable"}, {"teacher_view": "evaluation"}, {"text_tower": "frozen"}, OFF],
)
def test_resumed_to_the_bit(settings: dict[str, Any], tasks: list[Task], indexed: Batches) -> None:
    check_resuming(lambda: build(**settings), tasks, indexed)


def test_a_state_is_complete_and_another_tasks_is_refused(tasks: list[Task], indexed: Batches) -> None:
    method = learn(build(), tasks[:1], indexed)
    between = state(method)
    other = build()
    other.load_state_dict(between)
    images = indexed(0, 1)[0].images
    assert torch.equal(other.logits(images, tasks[0]), method.logits(images, tasks[0]))
    assert len(between) == len(method.backbone.model.state_dict()) + 1, "nothing but the model is carried on"
    method.before_task(1, tasks[1])
    with pytest.raises(RuntimeError, match="state: it holds another task's mean or prototypes"):
        other.load_state_dict(state(method))
    other.load_state_dict(method.backbone.model.state_dict())


@pytest.mark.parametrize(
    ("settings", "forward_limit", "backward_limit"),
    [({}, 95, 110), ({"teacher_view": "evaluation"}, 90, 110), ({"image_image_relation": False}, 90, 100)],
)
def test_a_step_dispatches_little_and_waits_for_nothing(
    settings: dict[str, Any], forward_limit: int, backward_limit: int, tasks: list[Task], indexed: Batches
) -> None:
    """Beside the towers of student and teachers."""
    method = learn(build(**settings), tasks[:1], indexed)
    method.before_task(1, tasks[1])
    steps = indexed(1, 2)
    train(method, steps[:1])
    with OperationCount() as towers:
        outputs = (
            method.backbone.encode_images(steps[1].images),
            method.backbone.encode_texts(method._texts, trimmed=True),
        )
        if method.config.teacher_view == "batch":
            method.teachers.encode_images(steps[1].images)
    with OperationCount() as towers_backward:
        (outputs[0].sum() + outputs[1].sum()).backward()
    with OperationCount() as forward:
        loss = method.loss(steps[1])["loss"]
    with OperationCount() as backward:
        loss.backward()
        method.before_step(steps[1])
        method.after_step(1)
    counts = forward.operations - towers.operations, backward.operations - towers_backward.operations
    assert counts[0] <= forward_limit, forward.by_name
    assert counts[1] <= backward_limit, backward.by_name
    assert not READS & (forward.by_name.keys() | backward.by_name.keys())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_tower": "both"}, "text_tower: expected one of trained, frozen, got 'both'"),
        ({"prototype_update": "mean"}, "prototype_update: expected one of ema, learnable, fixed, got 'mean'"),
        ({"teacher_view": "both"}, "teacher_view: expected one of batch, evaluation, got 'both'"),
        ({"teacher_weighting": "best"}, "teacher_weighting: expected one of confidence, .*equal, got 'best'"),
        ({"feature_distance": "cosine"}, "feature_distance: expected one of squared, norm, got 'cosine'"),
        ({"prototype_momentum": 1.5}, "prototype_momentum: expected 0 <= value <= 1, got 1.5"),
        ({"inter_task_share": -0.1}, "inter_task_share: expected 0 <= value <= 1, got -0.1"),
        ({"relation_weight": -1.0}, "relation_weight: expected a number >= 0, got -1"),
        ({"alignment_weight": float("nan")}, "alignment_weight: expected finite numbers, got nan"),
        ({"weighting_temperature": 0.0}, "weighting_temperature: expected a number > 0, got 0"),
        ({"average_every": -1}, "average_every: expected a number of steps >= 1, or 0 for none, got -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_what_is_missing_is_said(tasks: list[Task], batches: Batches) -> None:
    method, first = build(teacher_view="evaluation"), batches(0, 1)[0]
    with pytest.raises(RuntimeError, match="mulki: call before_task before the first step"):
        method.loss(first)
    method.before_task(0, tasks[0])
    with pytest.raises(ValueError, match="batch: expected indices for teacher_view='evaluation', got None"):
        method.loss(first)

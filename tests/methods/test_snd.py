"""SnD: its loss in float64, what is encoded once, what trains, and that nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import encoded_by_frozen
from tiny_clip import build_backbone
from torch import Tensor
from torch.nn import functional as F
from trained import SHORT, check_resuming, learn, state, train

from cl_kernels.profile import OperationCount
from cl_kernels.profile.waiting import READS
from cl_methods.components.dual_teachers import discrepancy_gate, feature_distances
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.snd import SnD, SnDConfig

Batches = Callable[..., list[Batch]]


def build(reference: Reference | None, **settings: Any) -> SnD:
    return SnD(build_backbone(), SnDConfig(**{**SHORT, **settings}), reference)


def plain_loss(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    student: Tensor,
    pretrained: Tensor,
    previous: Tensor,
    **settings: Any,
) -> Tensor:
    """The loss of one step, image by image in Python; a squared distance unless ``norm``."""
    loss = F.cross_entropy(100 * features @ classes.T, labels)
    for own, old, before in zip(student, pretrained, previous, strict=True):
        gate = 1 / (
            1 + torch.exp(-settings["sharpness"] * ((old - before).square().sum().sqrt() - settings["threshold"]))
        )
        apart = [(own - teacher).square().sum() for teacher in (before, old)]
        if settings["distance"] == "norm":
            apart = [value.sqrt() for value in apart]
        shares = settings["previous_weight"] * gate, settings["pretrained_weight"] * (1 - gate)
        loss = loss + (shares[0] * apart[0] + shares[1] * apart[1]) / len(student)
    return loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distance": "norm", "previous_weight": 2.0},
        {"threshold": 0.7, "sharpness": 2.0, "pretrained_weight": 3.0},
        {"previous_weight": 0.0},
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_loss_and_gradient_in_float64(
    settings: dict[str, Any], first: bool, tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    """Against plain PyTorch on features of separate passes; during the first task the two teachers are the same."""
    method = build(reference, **settings)
    if not first:
        learn(method, tasks[:1], batches)
    index = 0 if first else 1
    method.before_task(index, tasks[index])
    teachers = [build_backbone(), method.backbone.frozen_copy()]
    torch.manual_seed(0)
    with torch.no_grad():
        for _, value in method.trainable():
            value.add_(0.05 * torch.randn(value.shape))
    for model in (method.backbone.model, *(teacher.model for teacher in (*teachers, *method.teachers.models))):
        model.double()
    method.teachers.load_state_dict({})  # nothing of what was encoded in float32
    backbone = method.backbone
    names = [f"a photo of {name}" for name in tasks[index].class_names]
    texts = method._classes = backbone.encode_texts(backbone.tokenize(names)).detach()
    batch = batches(index, 1)[0]
    images, shown = batch.images.double(), batch.reference_images.double()  # type: ignore[union-attr]
    logged = method.loss(Batch(images, batch.labels, 0, shown, batch.reference_indices))
    parameters = [value for _, value in method.trainable()]
    gradients = torch.autograd.grad(logged["loss"], parameters, allow_unused=True)
    with torch.no_grad():
        encoded = [teacher.encode_images(shown) for teacher in teachers]
    assert first == torch.equal(*encoded)
    known = vars(method.config)
    scaled = backbone.encode_images(images) * (backbone.logit_scale.detach() / 100)
    expected = plain_loss(scaled, batch.labels, texts, backbone.encode_images(shown), *encoded, **known)
    torch.testing.assert_close(logged["loss"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logged["loss"], logged["cross_entropy"] + logged["distillation"])
    assert logged["distillation"] > 0
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11)


def test_the_gate_follows_the_distance_of_the_teachers() -> None:
    old = F.normalize(torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    side = torch.linalg.qr(torch.cat([old, torch.ones(1, 8, dtype=torch.float64)]).T)[0][:, 1]
    apart = torch.tensor([0.0, 0.1, 0.2, 0.5, 2.0], dtype=torch.float64)
    gate = discrepancy_gate(old.expand(5, 8), old + apart[:, None] * side, 0.2, 6.0)
    torch.testing.assert_close(gate, 1 / (1 + torch.exp(-6 * (apart - 0.2))))
    assert gate[2] == pytest.approx(0.5)


@pytest.mark.parametrize("distance", ["squared", "norm"])
def test_distances(distance: Any) -> None:
    torch.manual_seed(1)
    student = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    teachers = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(
        feature_distances(student, teachers, distance),
        torch.stack(
            [
                torch.stack(
                    [
                        (s - t).norm() ** (2 if distance == "squared" else 1)
                        for s, t in zip(student, teacher, strict=True)
                    ]
                )
                for teacher in teachers
            ]
        ),
    )
    assert torch.autograd.gradcheck(lambda features: feature_distances(features, teachers, distance), student)
    at_teacher = teachers[0].clone().requires_grad_()
    feature_distances(at_teacher, teachers[:1], distance).sum().backward()
    assert torch.equal(at_teacher.grad, torch.zeros(5, 3, dtype=torch.float64)), "no step away from an agreeing teacher"


def test_the_image_tower_trains_and_class_texts_are_kept(
    tasks: list[Task], reference: Reference, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches show 12 different reference images: the pre-trained model reads each once, the other in its one task."""
    method = build(reference)
    before = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    read = encoded_by_frozen(monkeypatch)
    learn(method, tasks, batches)
    assert read == {"images": 24, "texts": 0}
    moved = {name for name, value in method.backbone.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= {name for name, _ in method.trainable()}
    assert moved
    assert all(name.startswith("visual.") for name in moved)
    classifier = method.classifier(tasks[0])
    method.before_evaluation()
    assert method.classifier(tasks[0]) is classifier
    torch.testing.assert_close(classifier, method.backbone.class_embeddings(tasks[0].class_names, tasks[0].templates))


def test_resumed_to_the_bit(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    check_resuming(lambda: build(reference), tasks, batches)


def test_a_state_scores_alike_in_a_new_instance(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method, other = learn(build(reference), tasks, batches), build(reference)
    images = batches(0, 1)[0].images
    with torch.no_grad():
        other.backbone.model.text_projection.mul_(-1)
    stale = other.logits(images, tasks[0])
    other.load_state_dict(state(method))
    assert torch.equal(other.logits(images, tasks[0]), method.logits(images, tasks[0]))
    assert not torch.equal(stale, other.logits(images, tasks[0]))
    assert state(other).keys() == state(method).keys()
    other.load_state_dict(method.backbone.model.state_dict())
    assert state(other).keys() == method.backbone.model.state_dict().keys()


def test_a_step_dispatches_little_and_waits_for_nothing(
    tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    """Beyond the student's two passes in one: less than 30 operations forward, no text tower."""
    method = build(reference)
    learn(method, tasks[:1], batches)
    method.before_task(1, tasks[1])
    steps = batches(1, 4)
    train(method, steps[:3])  # every reference image has been met
    images = torch.cat([steps[3].images, steps[3].reference_images])
    with OperationCount() as tower:
        features = method.backbone.encode_images(images)
    with OperationCount() as tower_backward:
        features.sum().backward()
    with OperationCount() as forward:
        loss = method.loss(steps[3])["loss"]
    with OperationCount() as backward:
        loss.backward()
        method.before_step(steps[3])
        method.after_step(3)
    assert forward.operations - tower.operations <= 30, (forward.by_name, tower.by_name)
    assert backward.operations - tower_backward.operations <= 15, (backward.by_name, tower_backward.by_name)
    assert not READS & (forward.by_name.keys() | backward.by_name.keys())


def test_only_the_first_step_of_the_first_task_agrees_with_its_teacher(
    tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    method = build(reference)
    method.before_task(0, tasks[0])
    assert method.loss(batches(0, 1)[0])["distillation"] < 1e-9
    train(method, batches(0, 4))
    assert method.loss(batches(0, 1)[0])["distillation"] > 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "cosine"}, "distance: expected one of squared, norm, got 'cosine'"),
        ({"reference_batch_size": 0}, "reference_batch_size: expected a number of images >= 1, got 0"),
        ({"previous_weight": -1.0}, "previous_weight: expected a number >= 0, got -1"),
        ({"sharpness": float("inf")}, "sharpness: expected finite numbers, got inf"),
        ({"threshold": float("nan")}, "threshold: expected finite numbers, got nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str, reference: Reference) -> None:
    with pytest.raises(ValueError, match=message):
        build(reference, **settings)


def test_what_is_missing_is_said(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    with pytest.raises(
        ValueError, match=r"reference: expected unlabelled images, on which snd distils, got None: .*_reference"
    ):
        build(None)
    method, first = build(reference), batches(0, 1)[0]
    with pytest.raises(RuntimeError, match="snd: call before_task before the first step"):
        method.loss(first)
    method.before_task(0, tasks[0])
    with pytest.raises(ValueError, match="batch: expected reference_images, got None"):
        method.loss(Batch(first.images, first.labels, 0))


def test_published_settings() -> None:
    published = METHODS["snd"].default_config("mtil")
    known = {
        "lr": 1e-5,
        "batch_size": 32,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "warmup": 0,
        "iterations": 1000,
    }
    known |= {
        "previous_weight": 9.0,
        "pretrained_weight": 0.5,
        "threshold": 0.2,
        "sharpness": 6.0,
        "reference_batch_size": 64,
    }
    assert {name: getattr(published, name) for name in known} == known

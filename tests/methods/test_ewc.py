"""EWC: the Fisher information image by image, the springs and their gradient, what is carried on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, transform
from torch.nn import functional as F
from trained import SHORT, Batches, learn, train, weights

from cl_methods.components.fisher import fisher_diagonal
from cl_methods.components.weights import consolidation_value, fold_consolidation_gradient
from cl_methods.datasets.task import Task
from cl_methods.methods import EWC, METHODS
from cl_methods.methods.ewc import EWCConfig


def build(**settings: Any) -> EWC:
    return EWC(build_backbone(), EWCConfig(**{**SHORT, "fisher_samples": 10, **settings}))


@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_fisher_is_the_mean_square_of_single_gradients(labels: str, tasks: list[Task]) -> None:
    """Against one plain forward and backward pass for each image and, for drawn labels, their expectation."""
    method, task = build(), tasks[0]
    method.backbone.model.double()
    parameters, texts = method.trainable(), method.training_texts(task)
    method.backbone.eval_transform = lambda image: transform(image).double()
    torch.manual_seed(0)
    count = len(task.train)
    rounds = 1 if labels == "true" else 60
    ours = [
        fisher_diagonal(method.backbone, parameters, task.train, texts, samples=count + 5, labels=labels)
        for _ in range(rounds)
    ]
    expected = {name: torch.zeros_like(value) for name, value in parameters}
    for index in range(count):
        backbone = method.backbone
        image = transform(task.train.image(index)).double()[None]
        scores = (backbone.logit_scale * backbone.encode_images(image) @ backbone.encode_texts(texts).T).log_softmax(
            -1
        )[0]
        chances = scores.detach().exp()
        if labels == "true":
            chances = F.one_hot(task.train.labels[index], len(chances)).double()
        for label, chance in enumerate(chances.tolist()):
            gradients = torch.autograd.grad(
                scores[label], [value for _, value in parameters], retain_graph=True, allow_unused=True
            )
            for (name, _), gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    expected[name] += chance * gradient.square() / count
    total = {name: sum(one[name].sum() for one in ours) / rounds for name, _ in parameters}
    for name, value in expected.items():
        if labels == "true":
            torch.testing.assert_close(ours[0][name], value, rtol=1e-9, atol=1e-12)
        elif value.sum() > 1e-6:  # a mean over draws: about four standard errors
            assert float(total[name] / value.sum()) == pytest.approx(1, abs=0.15), name
    assert expected["visual.proj"].sum() > 0
    assert expected["text_projection"].sum() > 0


def test_only_some_images_are_looked_at(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    method, seen = build(), []
    original = type(tasks[0].train).image
    monkeypatch.setattr(type(tasks[0].train), "image", lambda self, index: seen.append(index) or original(self, index))
    texts = method.training_texts(tasks[0])
    fisher_diagonal(method.backbone, method.trainable(), tasks[0].train, texts, samples=7)
    assert len(seen) == len(set(seen)) == 7
    with pytest.raises(ValueError, match="labels: expected sampled or true, got 'mine'"):
        fisher_diagonal(method.backbone, method.trainable(), tasks[0].train, texts, samples=7, labels="mine")
    with pytest.raises(ValueError, match="source: expected images"):
        fisher_diagonal(method.backbone, method.trainable(), tasks[0].train, texts, samples=0)


def test_weighted_consolidation_in_closed_form() -> None:
    """Value and gradient with an importance for every scalar equal those of autograd; parameters without gradient stay so."""
    torch.manual_seed(0)
    names = [("a", torch.nn.Parameter(torch.randn(3, 4))), ("b", torch.nn.Parameter(torch.randn(5)))]
    idle = ("c", torch.nn.Parameter(torch.ones(2)))
    anchor = {name: torch.randn_like(value) for name, value in names} | {"c": torch.ones(2)}
    importance = {name: torch.rand_like(value) for name, value in names} | {"c": torch.ones(2)}
    penalty = sum((importance[name] * (value - anchor[name]).square()).sum() for name, value in names)
    (0.7 * penalty).backward()
    expected = [value.grad for _, value in names]
    for _, value in names:
        value.grad = torch.ones_like(value)
    fold_consolidation_gradient([*names, idle], anchor, 0.7, importance)
    torch.testing.assert_close(consolidation_value([*names, idle], anchor, importance), penalty.detach())
    for gradient, (_, value) in zip(expected, names, strict=True):
        torch.testing.assert_close(value.grad, gradient + 1)
    assert idle[1].grad is None


def test_springs_appear_with_the_second_task(tasks: list[Task], batches: Batches) -> None:
    method = build(strength=50.0)
    method.before_task(0, tasks[0])
    assert method.loss(batches(0, 1)[0]).keys() == {"loss"}
    learn(method, tasks[:1], batches)
    anchor, fisher = weights(method), method.fisher
    method.before_task(1, tasks[1])
    train(method, batches(1, 2))
    batch = batches(1, 1)[0]
    springs = sum(25.0 * (fisher[name] * (value - anchor[name]).square()).sum() for name, value in method.trainable())
    logged = method.loss(batch)
    torch.testing.assert_close(logged["consolidation"], springs.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logged["loss"], logged["cross_entropy"] + logged["consolidation"])
    named = dict(method.trainable())
    whole = torch.autograd.grad(method.loss(batch)["cross_entropy"] + springs, list(named.values()), allow_unused=True)
    method.backbone.model.zero_grad()
    logged["loss"].backward()
    method.before_step(batch)
    for (name, value), gradient in zip(named.items(), whole, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_stiff_springs_hold_what_matters(tasks: list[Task], batches: Batches) -> None:
    """The stronger the springs, the less the weights move in the directions that the first task depends on."""
    moved = []
    for strength in (0.0, 1e4):
        method = learn(build(strength=strength), tasks[:1], batches)
        start, fisher = weights(method), method.fisher
        method.before_task(1, tasks[1])
        train(method, batches(1, 12))
        moved.append(float(consolidation_value(method.trainable(), start, fisher)))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("decay", [1.0, 0.25])
def test_fisher_information_adds_up(decay: float, tasks: list[Task], batches: Batches) -> None:
    method = learn(build(decay=decay, fisher_samples=24, fisher_labels="true"), tasks[:1], batches)
    first = method.fisher
    method.before_task(1, tasks[1])
    train(method, batches(1, 3))
    method.after_task(1, tasks[1])
    texts = method.training_texts(tasks[1])
    second = fisher_diagonal(method.backbone, method.trainable(), tasks[1].train, texts, samples=24, labels="true")
    for name, value in method.fisher.items():
        torch.testing.assert_close(value, decay * first[name] + second[name], rtol=1e-3, atol=1e-6)


def test_a_foreign_state_is_refused(tasks: list[Task], batches: Batches) -> None:
    method = learn(build(), tasks[:1], batches)
    state = {**method.state_dict(), "ewc.fisher.visual.proj": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="Fisher information does not fit"):
        build().load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0}, "strength: expected a number >= 0, got -1"),
        ({"decay": 1.5}, "decay: expected 0 <= value <= 1, got 1.5"),
        ({"fisher_samples": 0}, "fisher_samples: expected a number of images >= 1, got 0"),
        ({"fisher_labels": "mine"}, "fisher_labels: expected one of sampled, true, got 'mine'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
    assert METHODS["ewc"].default_config("mtil").task_lr["Aircraft"] == 5e-5

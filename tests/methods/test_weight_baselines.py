"""Weight ensemble and weight consolidation: which weights are kept, what holds them, and that each is one part of ZSCL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone
from trained import SHORT, Batches, check_resuming, learn, state, train, weights, with_sgd

from cl_methods.components.weights import consolidation_value
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS


def build(name: str, **settings: Any) -> Any:
    return METHODS[name](build_backbone(), METHODS[name].Config(**{**SHORT, **settings}))


@pytest.mark.parametrize(("every", "snapshots"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (100, [0])])
def test_the_ensemble_is_the_mean_of_start_and_snapshots(
    every: int, snapshots: list[int], tasks: list[Task], batches: Batches
) -> None:
    """Every so many steps, the first included; in the second task the start is the first one's mean."""
    method = learn(build("weight_ensemble", average_every=every), tasks[:1], batches)
    taken, plain = [weights(method)], build("finetune")
    plain.load_state_dict(method.backbone.model.state_dict())
    plain.before_task(1, tasks[1])
    original = plain.after_step

    def note(step: int) -> None:
        original(step)
        if step in snapshots:
            taken.append(weights(plain))

    plain.after_step = note
    train(plain, batches(1, 4))
    method.before_task(1, tasks[1])
    train(method, batches(1, 4))
    method.after_task(1, tasks[1])
    assert len(taken) == 1 + len(snapshots)
    for name, value in weights(method).items():
        mean = torch.stack([one[name] for one in taken]).double().mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    moved = [(taken[-1][name] - taken[0][name]).abs().max() for name in taken[0]]
    assert max(moved) > 1e-4


def test_the_wise_ensemble_is_pulled_to_the_start(tasks: list[Task], batches: Batches) -> None:
    """``θ̂ ← α (n θ̂ + θ) / (n + 1) + (1 − α) θ_start`` step by step."""
    method = build("weight_ensemble", average_every=1, ensemble="wise", ensemble_wise_alpha=0.7)
    start = weights(method)
    method.before_task(0, tasks[0])
    expected, original, count = {name: value.double() for name, value in start.items()}, method.after_step, [0]

    def note(step: int) -> None:
        original(step)
        count[0] += 1
        for name, value in weights(method).items():
            mean = expected[name] + (value - expected[name]) / (count[0] + 1)
            expected[name] = 0.7 * mean + 0.3 * start[name]

    method.after_step = note
    train(method, batches(0, 4))
    method.after_task(0, tasks[0])
    for name, value in weights(method).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_consolidation_is_the_penalty_and_its_gradient(tasks: list[Task], batches: Batches) -> None:
    """Logged value and gradient of the second task against autograd; the springs hold to that task's start."""
    method = learn(build("weight_consolidation", consolidation=3.0), tasks[:1], batches)
    start = weights(method)
    method.before_task(1, tasks[1])
    train(method, batches(1, 2))
    batch = batches(1, 3)[2]
    penalty = 3.0 * sum((value - start[name]).square().sum() for name, value in method.trainable())
    method.backbone.model.zero_grad()
    logged = method.loss(batch)
    logged["loss"].backward()
    method.before_step(batch)
    found = {name: value.grad.clone() for name, value in method.trainable()}
    torch.testing.assert_close(logged["loss"], logged["cross_entropy"] + penalty)
    torch.testing.assert_close(3.0 * logged["consolidation"], penalty)
    method.backbone.model.zero_grad()
    features = method.backbone.encode_images(batch.images)
    (method.cross_entropy(features, batch.labels, method._texts) + penalty).backward()
    assert penalty > 0
    for name, value in method.trainable():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)


def test_consolidation_keeps_weights_closer(tasks: list[Task], batches: Batches) -> None:
    """Zero strength is fine-tuning to the bit; the stronger, the less the weights of a task move."""
    moved, ends = [], {}
    for strength in (0.0, 0.5, 5.0):
        method = build("weight_consolidation", consolidation=strength, lr=0.05)
        start = weights(method)
        method.before_task(0, tasks[0])
        train(method, batches(0, 4), optimizer=with_sgd(method, 0.05))
        ends[strength] = weights(method)
        moved.append(float(sum((ends[strength][name] - value).square().sum() for name, value in start.items())))
    plain = build("finetune", lr=0.05)
    plain.before_task(0, tasks[0])
    train(plain, batches(0, 4), optimizer=with_sgd(plain, 0.05))
    assert all(torch.equal(value, ends[0.0][name]) for name, value in weights(plain).items())
    assert moved[0] > 1.05 * moved[1] > 1.1 * moved[2] > 0, moved


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("weight_ensemble", {"average_every": 2}),
        ("weight_ensemble", {"average_every": 1, "ensemble": "wise"}),
        ("weight_consolidation", {}),
    ],
)
def test_resuming_in_the_middle_of_a_task(
    name: str, settings: dict[str, Any], tasks: list[Task], batches: Batches
) -> None:
    check_resuming(lambda: build(name, **settings), tasks, batches)


@pytest.mark.parametrize("name", ["weight_ensemble", "weight_consolidation"])
def test_between_tasks_only_the_model_is_stored(name: str, tasks: list[Task], batches: Batches) -> None:
    method = learn(build(name), tasks[:1], batches)
    stored = {key for key, value in state(method).items() if value.numel() > 1 and key.startswith("zscl.")}
    assert not stored
    assert not method.uses_reference
    assert METHODS[name].default_config("mtil").task_lr["MNIST"] == 5e-5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("weight_ensemble", {"average_every": 0}, "average_every: expected a number > 0, got 0"),
        ("weight_ensemble", {"ensemble": "none"}, "ensemble: expected one of mean, wise, got 'none'"),
        ("weight_ensemble", {"ensemble_wise_alpha": 1.5}, "ensemble_wise_alpha: expected 0 <= value <= 1, got 1.5"),
        ("weight_consolidation", {"consolidation": -1.0}, "consolidation: expected a number >= 0, got -1"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_the_value_of_the_consolidation_is_exact_for_large_tensors() -> None:
    """A token embedding has 25 million scalars: sums over it must not lose digits, as torch's fp32 norm on a CPU does."""
    torch.manual_seed(0)
    value = torch.randn(5000, 1000)
    found = consolidation_value([("embedding", value)], {"embedding": torch.zeros_like(value)})
    torch.testing.assert_close(found.double(), value.double().square().sum(), rtol=1e-6, atol=0)

"""CLIPood: what trains against what, what a task ends with, what a step costs, and resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_clip import CONTEXT, build_backbone, tokenize, transform
from torch.nn import functional as F
from trained import SHORT, Batches, learn, state, train, weights

import cl_kernels as clk
from cl_kernels.profile import OperationCount
from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS

import open_clip  # isort: skip  # after cl_methods.backbone.model, which prepares torchvision

SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal"}


def build(**settings: Any) -> Any:
    return METHODS["clipood"](build_backbone(), METHODS["clipood"].Config(**{**SHORT, **settings}))


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_the_true_class_has_to_win_by_a_margin(margin: float, tasks: list[Task], batches: Batches) -> None:
    """Against the cross-entropy with ``s λ (1 − t_y·t_c)`` added to every other class, in float64."""
    method = build(margin=margin)
    method.before_task(0, tasks[0])
    batch, backbone = batches(0, 1)[0], method.backbone
    texts = backbone.encode_texts(backbone.tokenize([f"a photo of {name}" for name in tasks[0].class_names])).double()
    cosines = backbone.encode_images(batch.images).double() @ texts.T
    asked = margin * (1 - texts @ texts.T)[batch.labels]
    expected = F.cross_entropy(float(backbone.logit_scale) * (cosines + asked), batch.labels)
    torch.testing.assert_close(method.loss(batch)["loss"].double(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_image_tower_trains(tasks: list[Task], batches: Batches) -> None:
    before = build_backbone().model.state_dict()
    method = learn(build(weight_decay=0.1), tasks, batches)
    after = method.backbone.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in method.trainable()}
    assert all(name.startswith("visual.") for name in moved)
    assert not method.backbone.model.training
    assert not any(value.requires_grad for value in method.backbone.model.parameters())


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_a_task_ends_with_the_beta_average_of_its_steps(beta: float, tasks: list[Task], batches: Batches) -> None:
    """Against the density of ``torch.distributions``; the second task starts from the first one's average."""
    method = learn(build(beta=beta), tasks[:1], batches)
    taken, original = [weights(method)], method.after_step
    method.before_task(1, tasks[1])

    def note(step: int) -> None:
        original(step)
        taken.append(weights(method))

    method.after_step = note
    train(method, batches(1, 4))
    method.after_task(1, tasks[1])
    parameter = torch.tensor(beta, dtype=torch.float64)
    x = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    shares = torch.distributions.Beta(parameter, parameter).log_prob(x).exp()
    shares /= shares.sum()
    for name, value in weights(method).items():
        expected = sum(share * one[name].double() for share, one in zip(shares, taken, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(taken[-1][name], value) for name, value in weights(method).items())


def test_steps_too_small_for_half_precision_are_not_lost(tasks: list[Task], batches: Batches) -> None:
    """The published rate moves a weight of 2⁻⁴ by less than half the distance of two float16 numbers there."""
    method = build(lr=5e-6, weight_decay=0.0)
    before = weights(method)
    method.before_task(0, tasks[0])
    train(method, batches(0, 2))
    name = "visual.class_embedding"
    moved = (weights(method)[name] - before[name]).abs()
    assert 0 < float(moved.max()) < 2.0**-4 * 2.0**-11
    assert all(value.dtype == torch.float32 for value in method.average.tensors.values() if value.is_floating_point())


def test_a_step_encodes_no_text_and_never_waits(tasks: list[Task], batches: Batches) -> None:
    """Besides the image tower itself, forward and backward, a step has few operations and none that reads a value."""
    method = build()
    method.before_task(0, tasks[0])
    batch = batches(0, 1)[0]
    optimizer = method.optimizer()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method.loss(batch)["loss"].backward()
        method.before_step(batch)

    step()
    with OperationCount() as whole:
        step()
    with OperationCount() as tower:
        method.backbone.encode_images(batch.images).sum().backward()
    compiled = clk.backends()["average_"]["cpu"] == "available"
    with OperationCount() as after, clk.use_backend("cpu" if compiled else "reference"):
        method.after_step(0)
    assert SYNCHRONISING.isdisjoint(whole.by_name | after.by_name)
    assert "aten::embedding" not in whole.by_name
    assert whole.operations - tower.operations <= 12, (whole.by_name, tower.by_name)
    assert after.operations == (1 if compiled else 3 * len(method.trainable())), after.by_name


def test_statistics_of_norm_layers_are_held(tasks: list[Task], batches: Batches) -> None:
    """A ResNet's batch normalisation keeps its running mean and variance, while its weights and biases train."""
    torch.manual_seed(0)
    layers = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=layers, text_cfg=text)
    backbone = Backbone(model, tokenize, transform, transform, name="resnet")
    method = METHODS["clipood"](backbone, METHODS["clipood"].Config(**SHORT))
    before = {name: value.clone() for name, value in model.visual.state_dict().items()}
    shown = [replace(batch, images=F.interpolate(batch.images, size=(64, 64))) for batch in batches(0, 4)]
    method.before_task(0, tasks[0])
    train(method, shown)
    method.after_task(0, tasks[0])
    after = model.visual.state_dict()
    statistics = {name for name, _ in model.visual.named_buffers()}
    assert any(name.endswith("running_var") for name in statistics)
    assert all(torch.equal(after[name], before[name]) for name in statistics)
    assert not torch.equal(after["bn1.bias"], before["bn1.bias"])


def test_class_embeddings_are_computed_once(tasks: list[Task], batches: Batches) -> None:
    """The text tower never changes."""
    method = build()
    first = method.classifier(tasks[1])
    learn(method, tasks[:1], batches)
    method.before_evaluation()
    assert method.classifier(tasks[1]) is first


def test_runs_repeat_and_states_round_trip(tasks: list[Task], batches: Batches) -> None:
    one, two = (state(learn(build(), tasks, batches)) for _ in range(2))
    assert one.keys() == two.keys() == {name for name, _ in build().trainable()}
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    other = build()
    other.load_state_dict(one)
    assert all(torch.equal(value, one[name]) for name, value in state(other).items())
    with pytest.raises(RuntimeError, match="state: 'logit_scale' is no tensor of clipood"):
        other.load_state_dict({"logit_scale": torch.zeros(())})
    middle = build()
    middle.before_task(0, tasks[0])
    with pytest.raises(RuntimeError, match="it is one from inside a task; call before_task first"):
        other.load_state_dict(state(middle))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": -0.1}, "margin: expected a number >= 0, got -0.1"),
        ({"beta": 0.0}, "beta: expected a number > 0, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_published_settings() -> None:
    config = METHODS["clipood"].Config()
    assert (config.lr, config.weight_decay, config.margin, config.beta, config.batch_size) == (5e-6, 0.1, 0.3, 0.5, 36)
    assert config.iterations == 5000
    with pytest.raises(RuntimeError, match="clipood: call before_task before the first step"):
        build().loss(None)

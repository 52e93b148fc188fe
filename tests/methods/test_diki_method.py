"""DIKI: what trains, what a step and a test cost, scopes, weights, states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images, transform
from torch import Tensor
from torch.distributions import MultivariateNormal
from trained import SHORT, check_resuming, learn, state, train

from cl_kernels.profile import OperationCount
from cl_methods.components.exemplars import encode_source
from cl_methods.components.gaussian import TaskGaussians, fit_gaussian, whiten
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Task
from cl_methods.methods import DIKI, Batch, Method, ZeroShot

import open_clip  # isort: skip  # after cl_methods.backbone.model, which prepares torchvision

Batches = Callable[..., list[Batch]]
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal"}
FACTORISATIONS = ("cholesky", "solve", "linalg_inv", "eigh", "svd", "lu_factor")


def build(**settings: Any) -> DIKI:
    near = {"calibration": "held_out", "weight_scale": 1.0, "weight_offset": -4.0, "ridge": 1e-3}
    short = {**SHORT, "lr": 0.05, "optimizer": "adamw", "epochs": None, "prompts": 4, **near}
    return DIKI(build_backbone(), DIKI.Config(**{**short, **settings}))


def shown(task: Task, count: int = 24) -> Tensor:
    return torch.stack([transform(task.test.image(index)) for index in range(count)])


@pytest.fixture
def learnt(tasks: list[Task], batches: Batches) -> Callable[..., Method]:
    return lambda **settings: learn(build(**settings), tasks, batches)


def test_gaussians_against_the_definition() -> None:
    torch.manual_seed(0)
    sets = [torch.randn(40, 6) @ torch.randn(6, 6) + torch.randn(6) for _ in range(3)]
    gaussians, exact = TaskGaussians(), []
    for features in sets:
        mean, covariance = fit_gaussian(features, 1e-4)
        torch.testing.assert_close(covariance, features.double().T.cov() + 1e-4 * torch.eye(6).double())
        exact.append(MultivariateNormal(features.double().mean(dim=0), covariance))
        gaussians.add(mean, covariance)
    test = torch.randn(2500, 6)
    expected = torch.stack([normal.log_prob(test.double()) for normal in exact], dim=1)
    torch.testing.assert_close(gaussians.log_prob(test), expected.float(), rtol=1e-4, atol=1e-3)
    gaussians.calibrate(sets[2])
    own = exact[2].log_prob(sets[2].double())
    torch.testing.assert_close(gaussians.typical[2], torch.stack([own.mean(), own.std()]).float(), rtol=1e-4, atol=1e-3)
    assert gaussians.typical[:2].tolist() == [[0, 1], [0, 1]]
    copy = TaskGaussians()
    copy.load(gaussians.state_dict())
    assert torch.equal(copy.log_prob(test), gaussians.log_prob(test))
    with pytest.raises(RuntimeError, match="state: expected means, factors, peaks, typical, got means"):
        copy.load({"means": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"mean: expected \(6,\), got \(5,\)"):
        gaussians.add(torch.zeros(5), torch.eye(5))
    with pytest.raises(ValueError, match="not positive definite; a larger ridge"):
        whiten(-torch.eye(3))
    with pytest.raises(ValueError, match=r"at least two rows, got \(1, 6\)"):
        fit_gaussian(test[:1])
    with pytest.raises(ValueError, match="ridge: expected a number > 0, got 0"):
        fit_gaussian(test, 0)
    with pytest.raises(ValueError, match="shrinkage: expected 0 <= value < 1, got 1"):
        fit_gaussian(test, shrinkage=1)


def test_shrinkage_keeps_densities_of_few_images_finite_in_size() -> None:
    """Five images in eight dimensions: a sixth image of the same kind is impossible by the ridge alone."""
    torch.manual_seed(0)
    features, found = torch.randn(25, 8), []
    for shrinkage in (0.0, 0.1):
        gaussians = TaskGaussians()
        gaussians.add(*fit_gaussian(features[:5], shrinkage=shrinkage))
        found.append(float(gaussians.log_prob(features[5:]).mean()))
    assert found[0] < -1e5
    assert found[1] > -200


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_task_changes_its_prompts_only(optimizer: str, tasks: list[Task], batches: Batches) -> None:
    method = build(optimizer=optimizer, lr=0.5, weight_decay=0.1)
    clip = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    learn(method, tasks[:1], batches)
    before = state(method)
    method.before_task(1, tasks[1])
    train(method, batches(1, 4))
    after = state(method)
    assert set(before) < set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name, value in method.backbone.model.state_dict().items():
        assert torch.equal(value, clip[name]), name
    for name, value in method.trainable():
        assert name.endswith(".1")
        assert value.grad is not None
        assert ("values" not in name) or value.any()
    assert all(value.grad is None for name, value in method.prompts.named_parameters() if name.endswith(".0"))


def test_a_step_never_waits_and_runs_every_encoder_once(tasks: list[Task], batches: Batches) -> None:
    method = build(depth=2, optimizer="sgd")
    method.before_task(0, tasks[0])
    optimizer = method.optimizer()
    batch = batches(0, 1)[0]
    method.loss(batch)["loss"].backward()
    with OperationCount() as forward:
        loss = method.loss(batch)["loss"]
    with OperationCount() as rest:
        loss.backward()
        method.before_step(batch)
        optimizer.step()
        method.after_step(0)
    assert forward.by_name["aten::convolution"] == 1  # the patches of one image tower, not of a second one
    assert not (set(forward.by_name) | set(rest.by_name)) & WAITING
    attention = sum(count for name, count in forward.by_name.items() if "attention" in name)
    assert attention == 2 * 4  # own and injected, in two blocks of both towers
    assert forward.operations <= 75, forward.operations
    assert rest.operations <= 130, rest.operations


def test_test_time_factorises_nothing(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    for scope in ("sample", "batch"):
        method = learnt(scope=scope)
        images = shown(tasks[0])
        with OperationCount() as count:
            method.logits(images, tasks[0])
        assert "aten::bmm" in count.by_name
        found = [name for name in count.by_name if any(part in name for part in FACTORISATIONS)]
        assert not found
        with OperationCount() as again:
            method.logits(images, tasks[0])
        assert again.by_name.get("aten::embedding", 0) == 0  # no text is encoded a second time


def test_sample_scope_ignores_the_rest_of_the_batch(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    mixed = torch.cat([shown(tasks[0], 3), shown(tasks[1], 5)])
    method = learnt()
    prompts, weights = method.injection(method.backbone.encode_images(mixed))
    assert prompts.tolist() == [0] * 3 + [1] * 5
    assert weights.unique().numel() > 1
    together = method.logits(mixed, tasks[1])
    for row, image in enumerate(mixed):
        torch.testing.assert_close(method.logits(image[None], tasks[1])[0], together[row], rtol=1e-4, atol=1e-4)
    other = learnt(scope="batch")
    alone = torch.cat([other.logits(image[None], tasks[1]) for image in mixed])
    assert (other.logits(mixed, tasks[1]) - alone).abs().max() > 1e-3


def test_interpolated_texts_converge(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    """To texts encoded for each image's own weight, with the square of the grid's step."""
    errors = []
    for levels in (2, 4, 8, 16):
        method = learnt(text_levels=levels, lr=0.3, weight_offset=0.0)
        images = shown(tasks[0])
        prompts, weights = method.injection(method.backbone.encode_images(images))
        exact = []
        for image, prompt, weight in zip(images, prompts.tolist(), weights.tolist(), strict=True):
            with method.prompts.active(prompt, weight):
                feature = method.backbone.encode_images(image[None])
                texts = method.backbone.class_embeddings(tasks[0].class_names, tasks[0].templates)
            exact.append(method.backbone.logit_scale * feature @ texts.T)
        errors.append(float((method.logits(images, tasks[0]) - torch.cat(exact).detach()).abs().max()))
    assert errors[0] > 1e-3
    assert all(fine < 0.5 * coarse for coarse, fine in pairwise(errors)), errors
    assert errors[-1] < 0.03 * errors[0]


def test_what_looks_like_no_task_sees_the_plain_model(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    unseen = Task("unseen", ("fly", "gnat"), ("a photo of {}",), *[noise_images(24, 7, 2)] * 3)
    method = learnt()
    zero_shot = ZeroShot(build_backbone(), ZeroShot.Config())
    plain = zero_shot.logits(shown(unseen), unseen)
    _, weights = method.injection(method.backbone.encode_images(shown(unseen)))
    assert weights.max() < 1e-3
    torch.testing.assert_close(method.logits(shown(unseen), unseen), plain, rtol=1e-3, atol=1e-3)
    _, own = method.injection(method.backbone.encode_images(shown(tasks[0])))
    assert own.median() > 0.9
    silent = learnt(weight_offset=1e6)
    torch.testing.assert_close(silent.logits(shown(tasks[0]), tasks[0]), zero_shot.logits(shown(tasks[0]), tasks[0]))


def test_published_weights_are_absolute(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    method = learnt(calibration="absolute", weight_scale=512.0, weight_offset=1.0)
    features = method.backbone.encode_images(shown(tasks[1]))
    density = method.gaussians.log_prob(features)
    prompts, weights = method.injection(features)
    torch.testing.assert_close(weights, torch.sigmoid(density.amax(dim=1) / 512 - 1))
    assert torch.equal(prompts, density.argmax(dim=1))


def test_without_validation_images_a_tenth_is_held_out(tasks: list[Task], batches: Batches) -> None:
    nothing = TensorImages(torch.zeros(0, 3, 16, 16, dtype=torch.uint8))
    method = build()
    for index, task in enumerate(tasks):
        method.before_task(index, task)
        method.after_task(index, Task(task.name, task.class_names, task.templates, task.train, nothing, nothing))
    assert (method.gaussians.typical[:, 1] > 0).all()
    full = fit_gaussian(encode_source(method.backbone, tasks[0].train))[0]
    assert not torch.allclose(method.gaussians.means[0], full.float())


def test_resuming_repeats_to_the_bit(tasks: list[Task], batches: Batches) -> None:
    check_resuming(build, tasks, batches)
    check_resuming(lambda: build(optimizer="sgd", calibration="absolute"), tasks, batches)


def test_state_round_trip(learnt: Callable[..., Any], tasks: list[Task]) -> None:
    method, copy = learnt(), build()
    generator = torch.random.get_rng_state()
    copy.load_state_dict(state(method))
    assert torch.equal(torch.random.get_rng_state(), generator)
    for task in tasks:
        assert torch.equal(copy.logits(shown(task), task), method.logits(shown(task), task))
    again = learnt()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state(method).items())
    with pytest.raises(RuntimeError, match=r"'model\.x' is no tensor of diki"):
        copy.load_state_dict({"model.x": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(prompts=3).load_state_dict(state(method))


def test_parameters_at_full_size() -> None:
    """8 blocks x 2 x 8 prompts x (768 + 512) for each task, 1.8 M for eleven; nothing is computed."""
    with torch.device("meta"):
        model = open_clip.CLIP(
            512,
            {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
            {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        )
    backbone = build_backbone()
    backbone.model = model
    method = DIKI(backbone, DIKI.Config())
    method.prompts.add(11)
    method.task = 10
    assert sum(value.numel() for _, value in method.trainable()) == 163_840
    assert sum(value.numel() for value in method.prompts.parameters()) == 1_802_240


def test_the_order_of_calls_and_settings_are_checked(batches: Batches) -> None:
    with pytest.raises(RuntimeError, match="diki: call before_task before the first step"):
        build().loss(batches(0, 1)[0])
    with pytest.raises(RuntimeError, match="diki: call before_task before asking what trains"):
        build().optimizer()
    for name in ("depth", "prompts", "ridge", "weight_scale", "text_levels"):
        with pytest.raises(ValueError, match=f"{name}: expected a number > 0, got 0"):
            DIKI.Config(**{name: 0})
    with pytest.raises(ValueError, match="shrinkage: expected 0 <= value < 1, got 1"):
        DIKI.Config(shrinkage=1)
    for name, others in (
        ("optimizer", "sgd, adamw"),
        ("scope", "sample, batch"),
        ("calibration", "absolute, held_out"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected one of {others}, got 'x'"):
            DIKI.Config(**{name: "x"})
    assert DIKI.default_config("mtil").task_iterations(1280) == 100

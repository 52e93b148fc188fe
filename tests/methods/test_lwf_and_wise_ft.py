"""LwF, LwF-VR and WiSE-FT: who teaches, on what, and what becomes of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone
from trained import SHORT, Batches, check_resuming, learn, train, weights, with_sgd

import cl_kernels as clk
from cl_methods.components.reference_features import random_texts
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS

FEW: dict[str, Any] = {"texts": 7, "words": 4}


def build(name: str, **settings: Any) -> Any:
    few = FEW if name == "lwf_vr" else {}
    return METHODS[name](build_backbone(), METHODS[name].Config(**{**SHORT, **few, **settings}))


@pytest.mark.parametrize("name", ["lwf", "lwf_vr"])
def test_the_teacher_is_the_model_from_before_the_task(name: str, tasks: list[Task], batches: Batches) -> None:
    """In the second task the distillation equals that from a copy of the first task's result on the right texts."""
    method = learn(build(name), tasks[:1], batches)
    teacher = method.backbone.frozen_copy()
    method.before_task(1, tasks[1])
    train(method, batches(1, 2))  # away from the teacher
    batch = batches(1, 3)[2]
    backbone = method.backbone
    prompts = backbone.tokenize([f"a photo of {name}" for name in tasks[1].class_names])
    tokens = prompts if name == "lwf" else random_texts(backbone, 7, 4)
    expected = clk.feature_distill_kl(
        backbone.encode_images(batch.reference_images),
        teacher.encode_images(batch.reference_images),
        teacher.frozen_text_features(tokens),
        logit_scale=float(backbone.logit_scale.detach()),
        backend="reference",
    )
    logged = method.loss(batch)
    torch.testing.assert_close(logged["distillation"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged["loss"], logged["cross_entropy"] + logged["distillation"])
    assert method.reference_source(tasks[1]) is tasks[1].train


@pytest.mark.parametrize("name", ["lwf", "lwf_vr"])
def test_an_aliased_teacher_makes_it_plain_fine_tuning(name: str, tasks: list[Task], batches: Batches) -> None:
    start = weights(learn(build("finetune"), tasks[:1], batches))
    ends, strong = {}, {"lr": 0.05, "distillation_weight": 20.0}
    for kind, method in {
        "finetune": build("finetune", lr=0.05),
        "aliased": build(name, aliased_teacher=True, **strong),
        "own": build(name, **strong),
    }.items():
        method.load_state_dict({**build_backbone().model.state_dict(), **start})
        method.before_task(1, tasks[1])
        train(method, batches(1, 4), optimizer=with_sgd(method, 0.05))
        ends[kind] = weights(method)
    moved = sum((ends["finetune"][key] - start[key]).square().sum() for key in start).sqrt()
    apart = {
        kind: sum((ends[kind][key] - ends["finetune"][key]).square().sum() for key in start).sqrt() / moved
        for kind in ("aliased", "own")
    }
    assert apart["aliased"] < 1e-4
    assert apart["own"] > 0.02


def test_an_aliased_teacher_gives_no_gradient(tasks: list[Task], batches: Batches) -> None:
    for aliased in (True, False):
        method = learn(build("lwf", aliased_teacher=aliased), tasks[:1], batches)
        method.before_task(1, tasks[1])
        train(method, batches(1, 2))
        term = method.loss(batches(1, 3)[2])["distillation"]
        gradient = torch.autograd.grad(term, [method.backbone.model.visual.proj])[0]
        assert (gradient.abs().max() < 1e-4) == aliased, float(gradient.abs().max())


@pytest.mark.parametrize(("towards", "alpha"), [("zero_shot", 0.3), ("start", 0.8), ("zero_shot", 0.0), ("start", 1.0)])
def test_wise_ft_interpolates_after_every_task(towards: str, alpha: float, tasks: list[Task], batches: Batches) -> None:
    method = build("wise_ft", alpha=alpha, towards=towards)
    zero_shot = weights(method)
    assert not method.uses_reference
    for index, task in enumerate(tasks):
        start = weights(method)
        method.before_task(index, task)
        train(method, batches(index, 4))
        tuned = weights(method)
        method.after_task(index, task)
        other = zero_shot if towards == "zero_shot" else start
        for name, value in weights(method).items():
            torch.testing.assert_close(value, alpha * tuned[name] + (1 - alpha) * other[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tuned[name], zero_shot[name]) for name in tuned)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("wise_ft", {}),
        ("wise_ft", {"towards": "start"}),
        ("lwf", {}),
        ("lwf", {"aliased_teacher": True}),
        ("lwf_vr", {}),
    ],
)
def test_resuming_in_the_middle_of_a_task(
    name: str, settings: dict[str, Any], tasks: list[Task], batches: Batches
) -> None:
    check_resuming(lambda: build(name, **settings), tasks, batches)


def test_published_settings() -> None:
    published = METHODS["wise_ft"].default_config("mtil")
    assert (published.alpha, published.towards, published.lr, published.task_lr["MNIST"]) == (0.8, "start", 1e-5, 5e-5)
    for name in ("lwf", "lwf_vr"):
        config = METHODS[name].default_config("mtil")
        assert (config.temperature, config.iterations, config.image_loss, config.text_loss) == (2.0, 1000, True, True)
        assert (config.as_zscl().consolidation, config.as_zscl().ensemble) == (0.0, "none")
        assert not config.aliased_teacher
    assert (config.texts, config.words) == (1000, 10)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wise_ft", {"alpha": 1.5}, "alpha: expected 0 <= value <= 1, got 1.5"),
        ("wise_ft", {"towards": "me"}, "towards: expected zero_shot or start, got 'me'"),
        ("lwf", {"temperature": 0.0}, "temperature: expected a number > 0, got 0"),
        ("lwf", {"reference_batch_size": 0}, "reference_batch_size: expected a number > 0, got 0"),
        ("lwf_vr", {"texts": 0}, "texts: expected a number >= 1, got 0"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_random_texts_must_fit(tasks: list[Task]) -> None:
    with pytest.raises(ValueError, match="length: expected at most 10 tokens"):
        build("lwf_vr", words=11).before_task(0, tasks[0])

"""What every registered method promises, and the two bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_clip import build_backbone, transform
from torch.nn import functional as F

from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.config import TrainConfig


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, tasks: list[Task], reference: Reference) -> None:
    method_type = METHODS[name]
    assert method_type.name == name
    config = method_type.default_config("mini")
    assert isinstance(config, method_type.Config)
    method_type.default_config("a scenario nobody knows")
    method = method_type(build_backbone(), config, reference)
    images = torch.stack([transform(tasks[0].test.image(index)) for index in range(4)])
    scores = method.logits(images, tasks[0])
    assert scores.shape == (4, 3)
    assert not scores.requires_grad
    plain = METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    assert torch.equal(scores, plain.logits(images, tasks[0]))
    if method.trains and not method.closed_form:
        stages = method.stages(tasks[0])
        assert (stages[0].steps, stages[0].lr) == (config.iterations + 1, config.lr)
        assert method.steps(tasks[0]) == sum(stage.steps for stage in stages)
        assert method.learning_rate(tasks[0]) == config.lr
    else:
        assert method.steps(tasks[0]) == (1 if method.trains else 0)


def test_zero_shot_has_nothing_to_train(tasks: list[Task], batches: Callable[..., list[Batch]]) -> None:
    method = METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    assert method.trainable() == []
    with pytest.raises(RuntimeError, match="zero_shot does not train"):
        method.loss(batches(0, 1)[0])


def test_class_embeddings_are_kept_until_weights_change(tasks: list[Task]) -> None:
    method = METHODS["finetune"](build_backbone(), METHODS["finetune"].Config())
    first = method.classifier(tasks[0])
    assert method.classifier(tasks[0]) is first
    with torch.no_grad():
        method.backbone.model.text_projection.mul_(-1)
    method.before_evaluation()
    torch.testing.assert_close(method.classifier(tasks[0]), -first)


def test_joint_uses_the_classes_of_the_batch(tasks: list[Task], batches: Callable[..., list[Batch]]) -> None:
    method = METHODS["joint"](build_backbone(), METHODS["joint"].Config(label_smoothing=0.0))
    assert method.joint
    method.before_task(0, tasks[0])
    for index, task in enumerate(tasks):
        batch = batches(index, 1)[0]
        backbone = method.backbone
        texts = backbone.encode_texts(backbone.tokenize([f"a photo of {name}" for name in task.class_names]))
        scores = backbone.logit_scale * backbone.encode_images(batch.images) @ texts.T
        torch.testing.assert_close(method.loss(batch)["loss"], F.cross_entropy(scores, batch.labels))


def test_training_needs_before_task(batches: Callable[..., list[Batch]]) -> None:
    for name in ("finetune", "joint"):
        method = METHODS[name](build_backbone(), METHODS[name].Config())
        with pytest.raises(RuntimeError, match="call before_task"):
            method.loss(batches(0, 1)[0])


def test_settings_are_checked() -> None:
    for name, value in (("lr", 0), ("iterations", 0), ("warmup", -1), ("label_smoothing", 1.0), ("betas", (0.9, 1.0))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TrainConfig(**{name: value})
    with pytest.raises(ValueError, match="task_lr: expected a number > 0 for 'x', got -1"):
        TrainConfig(task_lr={"x": -1})
    published = METHODS["moe_adapters"].default_config("mtil_few_shot")
    assert published.task_lr["Food101"] == 1e-2

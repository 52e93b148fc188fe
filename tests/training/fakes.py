"""A tiny method and scenario that need neither open_clip nor the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Method
from cl_methods.scenarios.base import Scenario


@dataclass
class TinyConfig:
    lr: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    iterations: int = 6
    warmup: int = 2
    batch_size: int = 8
    reference_batch_size: int = 4
    task_lr: dict[str, float] = field(default_factory=dict)

    def task_iterations(self, images: int) -> int:
        return self.iterations


def to_float(image: Tensor) -> Tensor:
    """Evaluation transform: [-1, 1]."""
    return image.float() / 127.5 - 1


def to_noisy_float(image: Tensor) -> Tensor:
    """Training transform that draws from the global generator, as random crops do."""
    return to_float(image) + 0.01 * torch.randn(image.shape)


def tiny_backbone(pixels: int = 48, classes: int = 3) -> SimpleNamespace:
    model = nn.Linear(pixels, classes)
    return SimpleNamespace(
        model=model,
        train_transform=to_noisy_float,
        eval_transform=to_float,
        device=torch.device("cpu"),
        name="tiny",
        micro_batches=None,
    )


class TinyMethod(Method):
    """Softmax regression with dropout (so that it draws random numbers) and a running mean of its weights."""

    name = "tiny"

    def before_task(self, index: int, task: Task) -> None:
        self.mean = self.backbone.model.weight.detach().clone()

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.backbone.model.named_parameters())

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        inputs = F.dropout(batch.images.flatten(1), 0.2)
        loss = F.cross_entropy(self.backbone.model(inputs), batch.labels)
        return {"loss": loss, "ce": loss}

    def after_step(self, step: int) -> None:
        self.mean.lerp_(self.backbone.model.weight.detach(), 1 / (step + 2))

    def after_task(self, index: int, task: Task) -> None:
        with torch.no_grad():
            self.backbone.model.weight.copy_(self.mean)

    def logits(self, images: Tensor, task: Task) -> Tensor:
        return self.backbone.model(images.flatten(1))

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.backbone.model.state_dict(), "mean": getattr(self, "mean", torch.zeros(()))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.backbone.model.load_state_dict({name: state[name] for name in ("weight", "bias")})
        self.mean = state["mean"].clone()


class ReferenceMethod(TinyMethod):
    """Also looks at reference images."""

    name = "tiny_reference"
    uses_reference = True

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(batch)
        penalty = self.backbone.model(batch.reference_images.flatten(1)).square().mean()
        return {"loss": terms["loss"] + 0.1 * penalty, "ce": terms["ce"], "penalty": penalty}


class ClosedFormMethod(TinyMethod):
    """Class means, updated batch by batch: what a method without optimiser steps looks like to a run."""

    name = "tiny_closed_form"
    closed_form = True

    def before_task(self, index: int, task: Task) -> None:
        self.mean = torch.zeros_like(self.backbone.model.weight)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return []

    def learn(self, batch: Batch) -> None:
        self.mean.index_add_(0, batch.labels, batch.images.flatten(1) + 0.01 * torch.randn(len(batch.labels), 48))


def tiny_images(count: int, seed: int, classes: int = 3) -> TensorImages:
    """4 x 4 noise whose brightness follows the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 120, (count, 3, 4, 4), generator=generator) + 60 * labels[:, None, None, None]
    return TensorImages(images.to(torch.uint8), labels)


def tiny_scenario(tasks: int = 3, train: int = 20) -> Scenario:
    names = ("red", "green", "blue")
    return Scenario(
        name="tiny",
        order="I",
        tasks=tuple(
            Task(
                name=f"task{index}",
                class_names=names,
                templates=("a {}.",),
                train=tiny_images(train, 10 * index),
                validation=tiny_images(6, 10 * index + 1),
                test=tiny_images(9, 10 * index + 2),
            )
            for index in range(tasks)
        ),
        reference=Reference(images=tiny_images(10, 999), captions=("a thing", "another thing")),
    )

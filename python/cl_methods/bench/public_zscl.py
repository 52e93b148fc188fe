"""A step of ZSCL as its public code takes it, in plain PyTorch: what ours is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.bench.agreement import in_double
from cl_methods.bench.own_step import OwnStep


class PublicZSCL:
    """``L = L_CE + λ Σ||θ − θ_start||² + KD(Z_t, Z_s) + KD(Z_tᵀ, Z_sᵀ)``, everything recomputed in every step.

    The teacher reads all captions at their full length and the reference images in every step, the student's two batches of
    images are two passes, class texts have their full length, consolidation is a sum over parameters that autograd
    differentiates, and the logits of both directions are formed as whole matrices.

    Source: restated from the procedure of Zheng et al., ICCV 2023, and the behaviour of its public code.

    Args:
        ours: the step of ours to mirror: its weights are copied, its frozen teacher is shared.
        class_tokens: (C, context) int64, untrimmed.
        caption_tokens: (M, context) int64, untrimmed.
    """

    def __init__(self, ours: OwnStep, model: Any, class_tokens: Tensor, caption_tokens: Tensor) -> None:
        method: Any = ours.method
        self.model, self.teacher = model, method.teacher.model.model
        self.config, self.batch = method.config, ours.batch
        self.class_tokens, self.caption_tokens = class_tokens, caption_tokens
        self.named = [(name, value) for name, value in model.named_parameters() if name != "logit_scale"]
        self.start = {name: method.weights.start[name] for name, _ in self.named}
        config = self.config
        self.optimizer = torch.optim.AdamW(
            [value for _, value in self.named], lr=config.lr, weight_decay=config.weight_decay, betas=config.betas
        )

    def loss(self) -> Tensor:
        """The loss of the batch."""
        config, batch, model = self.config, self.batch, self.model
        assert batch.reference_images is not None
        scale = model.logit_scale.exp()
        texts = _unit(model.encode_text(self.class_tokens))
        logits = scale * _unit(model.encode_image(batch.images)) @ texts.T
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)
        penalty: Any = 0.0
        for name, value in self.named:
            penalty = penalty + F.mse_loss(value, self.start[name], reduction="sum")
        loss = loss + config.consolidation * penalty
        with torch.no_grad():
            captions = _unit(self.teacher.encode_text(self.caption_tokens))
            shown = _unit(self.teacher.encode_image(batch.reference_images))
        student = scale * _unit(model.encode_image(batch.reference_images)) @ captions.T
        teacher = scale * shown @ captions.T
        loss = loss + self._distillation(student, teacher)
        return loss + self._distillation(student.T, teacher.T)

    def _distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.config.temperature
        probabilities = F.softmax(teacher / temperature, dim=1)
        return self.config.distillation_weight * temperature**2 * F.cross_entropy(student / temperature, probabilities)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the gradient of every trained tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        found = {name: value.grad.detach().clone() for name, value in self.named if value.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), found

    def exact_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`gradients`, computed in float64."""
        batch, start = self.batch, self.start
        assert batch.reference_images is not None
        self.batch = replace(batch, images=batch.images.double(), reference_images=batch.reference_images.double())
        self.start = {name: value.double() for name, value in start.items()}
        try:
            with in_double(self.model, self.teacher):
                return self.gradients()
        finally:
            self.batch, self.start = batch, start

    def run(self) -> None:
        """The whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def on_device(self) -> Iterator[Tensor]:
        """Weights, buffers, texts and the batch."""
        for module in (self.model, self.teacher):
            yield from (*module.parameters(), *module.buffers())
        yield from self.start.values()
        given = (self.class_tokens, self.caption_tokens, self.batch.images, self.batch.labels)
        yield from given
        if self.batch.reference_images is not None:
            yield self.batch.reference_images


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the weights of ``source``."""
    with torch.no_grad():
        for one, other in zip(target.parameters(), source.parameters(), strict=True):
            one.copy_(other)

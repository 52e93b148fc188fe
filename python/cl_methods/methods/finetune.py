"""Continual fine-tuning of the whole model on one task after another: the lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.datasets.task import Task
from cl_methods.methods.base import Batch, Facts, Method
from cl_methods.methods.config import TrainConfig


@dataclass(frozen=True)
class FineTuneConfig(TrainConfig):
    """Settings of :class:`TrainConfig`; the published MTIL values by default."""


class FineTune(Method):
    """``L = CE(s f_θ(x) g_θ(c)ᵀ, y)`` with label smoothing; both towers train, ``logit_scale`` does not.

    The class texts, first template only, go through the text tower with gradient in every step.
    Source: the fine-tuning baseline of ZSCL (Zheng et al., ICCV 2023).
    """

    name: ClassVar[str] = "finetune"
    facts: ClassVar[Facts] = Facts(
        source="baseline of Zheng et al., ICCV 2023",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )

    Config: ClassVar[type[TrainConfig]] = FineTuneConfig
    shards: ClassVar[bool] = True
    _texts: Tensor | None = None

    def before_task(self, index: int, task: Task) -> None:
        """Tokenise the task's training prompts."""
        super().before_task(index, task)
        self._texts = self.training_texts(task)
        self.backbone.model.train()

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Every parameter of the model but the logit scale (and the logit bias of sigmoid models)."""
        fixed = ("logit_scale", "logit_bias")
        return [(name, value) for name, value in self.backbone.model.named_parameters() if name not in fixed]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss"}``: the cross-entropy of the batch."""
        return {"loss": self.cross_entropy(self.backbone.encode_images(batch.images), batch.labels, self._texts)}

    def cross_entropy(self, features: Tensor, labels: Tensor, texts: Tensor | None) -> Tensor:
        """Label-smoothed cross-entropy of image features (B, d) with ``labels`` (B,) against the texts (C, L), re-encoded.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if texts is None:
            raise RuntimeError(f"{self.name}: call before_task before the first step")
        return self.classification(features, labels, self.backbone.encode_texts(texts, trimmed=True))

    def classification(self, features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """The same for text features ``classes`` (C, d) that are there already."""
        logits = self.backbone.logit_scale.detach() * features @ classes.T
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def after_task(self, index: int, task: Task) -> None:
        """Back to evaluation mode."""
        super().after_task(index, task)
        self.backbone.model.eval()

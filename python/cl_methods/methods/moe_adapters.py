"""MoE-Adapters: routed adapters in every block of a frozen CLIP, experts frozen once they are used, a detector of tasks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.backward_order import differentiate_last
from cl_methods.components.ddas import DDAS
from cl_methods.components.density_selector import DensitySelector
from cl_methods.components.expert_adamw import ExpertAdamW
from cl_methods.components.image_batch import PLAIN, ImageBatch
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts, Method
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.moe_adapters_config import MoEAdaptersConfig


@dataclass(frozen=True)
class Routed:
    """Images of a batch that share a router.

    Attributes:
        router: its index; None for the plain model.
        rows: (n,) int64, which images; None for all.
        features: (n, d), normalised.
    """

    router: int | None
    rows: Tensor | None
    features: Tensor


class MoEAdapters(Method):
    """``L = CE(s f(x) g(c)ᵀ, y)`` over the experts and the current router only; the CLIP weights never change.

    Adapters sit in every residual block of both towers (:class:`~cl_methods.components.adapters.MountedAdapters`). Each task adds a
    router; after it the most used experts of every block are frozen, though every router may still choose them. Test images
    go to the router of the task that the detector finds (:class:`~cl_methods.components.ddas.DDAS` as published, or
    :class:`~cl_methods.components.density_selector.DensitySelector`), or to the plain model.

    Source: Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts Adapters", CVPR 2024.
    As in its public code the load-balancing loss is not part of training, and experts without samples in a step are not
    updated. Unlike there, activation counts restart with each task and the list of frozen experts has no duplicates.
    """

    name: ClassVar[str] = "moe_adapters"
    facts: ClassVar[Facts] = Facts(
        source="Yu et al., CVPR 2024",
        trains="experts and one router per block",
        carries="routers, one autoencoder or density per task",
        test_time="a detector's guess of the task",
    )
    Config: ClassVar[type[TrainConfig]] = MoEAdaptersConfig
    config: MoEAdaptersConfig

    def __init__(self, backbone: Backbone, config: MoEAdaptersConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.adapters = MountedAdapters(
            backbone,
            experts=config.experts,
            bottleneck=config.bottleneck,
            top_k=config.top_k,
            scale=config.scale,
            dropout=config.dropout,
            text=config.text_adapters,
        )
        self.detector: DDAS | DensitySelector | None = None
        if config.detection == "ddas":
            self.detector = DDAS(backbone, config.ddas)
        elif config.detection == "density":
            self.detector = DensitySelector(backbone, config.density)
        self.router: int | None = None
        self._texts: Tensor | None = None
        self._routed: dict[tuple[int | None, tuple[str, ...]], Tensor] = {}

    def before_task(self, index: int, task: Task) -> None:
        """Add the task's router and restart the counts."""
        super().before_task(index, task)
        self.router = 0 if self.config.routers == "shared" else index
        for block in self.adapters.each():
            block.add_routers(self.router + 1)
            block.reset_usage()
        self._texts = self.training_texts(task)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The experts and the current task's router; frozen experts are rows that the optimiser leaves out.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self.router is None:
            raise RuntimeError("moe_adapters: call before_task before asking what trains")
        names = {"down_weight", "down_bias", "up_weight", "up_bias", f"routers.{self.router}", f"noises.{self.router}"}
        return [
            (f"{place}.{name}", value)
            for place, block in self.adapters.blocks.items()
            for name, value in block.named_parameters()
            if name in names
        ]

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW that skips frozen experts and experts without samples, moments included."""
        config = self.config
        masks = {expert: block.updates for block in self.adapters.each() for expert in block.experts}
        parameters = [value for _, value in self.trainable()]
        return ExpertAdamW(parameters, masks, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss"}``: the label-smoothed cross-entropy with the class texts re-encoded.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self._texts is None:
            raise RuntimeError("moe_adapters: call before_task before the first step")
        with self.adapters.active(self.router, training=True, noise=self.config.gating_noise):
            features = self.backbone.encode_images(batch.images)
            texts = self.backbone.encode_texts(self._texts, trimmed=True)
        differentiate_last(texts)
        logits = self.backbone.logit_scale * features @ texts.T
        return {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)}

    def before_step(self, batch: Batch) -> None:
        """Tell the optimiser which experts had samples."""
        super().before_step(batch)
        ranks.sum_([block.step_usage for block in self.adapters.each()])
        self.adapters.end_backward()

    def after_task(self, index: int, task: Task) -> None:
        """Freeze the most used experts; teach the detector the task's images."""
        super().after_task(index, task)
        if self.config.freeze:
            for block in self.adapters.each():
                block.freeze_most_used(self.config.freeze)
        if self.detector is not None:
            self._teach_detector(self.detector, index, task)

    def _teach_detector(self, detector: DDAS | DensitySelector, index: int, task: Task) -> None:
        if index == 0:
            if self.reference is not None and len(self.reference.images):
                detector.learn_generic(self.reference.images)
            else:
                warnings.warn(
                    "moe_adapters: this scenario has no reference images, so the detector has no model of generic data; "
                    "the threshold alone keeps unseen images on the plain model",
                    stacklevel=2,
                )
        detector.learn_task(index, task.train, task.validation)

    @torch.no_grad()
    def image_features(self, images: ImageBatch) -> list[Routed]:
        """The images in groups of one router; those that the plain model gets, and what the detector reads, never change."""
        if self.detector is None:
            return [self._encoded(images, self._shared(), None)]
        chosen = self.detector.decide_batch(images)
        groups = chosen.unique().tolist()
        whole = len(groups) == 1
        rows = [None if whole else (chosen == group).nonzero().squeeze(1) for group in groups]
        return [self._encoded(images, g if g >= 0 else None, own) for g, own in zip(groups, rows, strict=True)]

    def later_encodings(self) -> tuple[int, int]:
        """What the detector gives to the plain model is encoded in the first row only."""
        return (1, 1) if self.detector is None else (0, 1)

    def _encoded(self, images: ImageBatch, router: int | None, rows: Tensor | None) -> Routed:
        if router is None:
            features = images.frozen(PLAIN, self.backbone.encode_images)
            return Routed(None, rows, features if rows is None else features[rows])
        pixels = images.pixels().to(self.backbone.device)
        with self.adapters.active(router):
            return Routed(router, rows, self.backbone.encode_images(pixels if rows is None else pixels[rows]))

    def _shared(self) -> int | None:
        """The shared router once it exists."""
        return 0 if next(self.adapters.each()).routers else None

    def feature_scores(self, features: list[Routed], tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores, each image's from the router that the detector chose for it."""
        scale, count = self.backbone.logit_scale, sum(len(part.features) for part in features)
        found = [features[0].features.new_empty(count, len(task.class_names)) for task in tasks]
        for part in features:
            rows = slice(None) if part.rows is None else part.rows
            for scores, texts in zip(found, self._texts_of(part.router, tasks), strict=True):
                scores[rows] = (scale * part.features @ texts.T).to(scores.dtype)
        return found

    def _texts_of(self, router: int | None, tasks: Sequence[Task]) -> list[Tensor]:
        """Class embeddings (C_t, d) by a router; those that are missing are encoded together."""
        if router is None or not self.config.text_adapters:
            return [self.classifier(task) for task in tasks]
        keys = [(router, (*task.class_names, "", *task.templates)) for task in tasks]
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in self._routed}
        if missing:
            with self.adapters.active(router):
                self._routed |= zip(missing, self.embed_classes(list(missing.values())), strict=True)
        return [self._routed[key] for key in keys]

    def forget_classifiers(self) -> None:
        """Drop the class embeddings of every router; those of the plain model stay what they are."""
        self._routed.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters (``adapters.``) and detector (``ddas.`` or ``density.``); the CLIP weights never change and are not included."""
        state = {f"adapters.{name}": value for name, value in self.adapters.state_dict().items()}
        if self.detector is not None:
            state.update(
                {f"{self.config.detection}.{name}": value for name, value in self.detector.state_dict().items()}
            )
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`, creating the routers and the models of the detector that it holds.

        Raises:
            RuntimeError: the state is not one of this method.
        """
        parts: dict[str, dict[str, Tensor]] = {"adapters": {}, self.config.detection: {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise RuntimeError(
                    f"state: {name!r} is no tensor of moe_adapters with detection {self.config.detection}"
                )
            parts[part][rest] = value
        routers = 1 + max((int(name.split(".")[3]) for name in parts["adapters"] if ".routers." in name), default=-1)
        for block in self.adapters.each():
            block.add_routers(routers)
        self.adapters.load_state_dict(parts["adapters"])
        if self.detector is not None:
            self.detector.load_state(parts[self.config.detection])
        self.forget_classifiers()

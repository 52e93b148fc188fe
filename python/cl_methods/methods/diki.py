"""DIKI: prompts of each task beside a frozen CLIP's attention, injected as far as an image looks like the task's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.backbone import Backbone
from cl_methods.checks import check_field
from cl_methods.components.density_selector import with_held_out
from cl_methods.components.exemplars import encode_source
from cl_methods.components.gaussian import TaskGaussians, fit_gaussian
from cl_methods.components.image_batch import PLAIN, ImageBatch
from cl_methods.components.prompt_attention import MountedPrompts
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts, Method
from cl_methods.methods.config import TrainConfig


@dataclass(frozen=True)
class DIKIConfig(TrainConfig):
    """Settings of :class:`DIKI`; the defaults are those of the published MTIL runs.

    Attributes:
        optimizer: ``sgd`` without momentum (published), or ``adamw``.
        depth: blocks of each tower that have prompts, from the first; all where a tower has fewer.
        prompts: per task and block.
        ridge: added to the diagonal of the features' covariance.
        shrinkage: share of the covariance that is replaced by a multiple of the identity; with fewer training images than
            features have numbers, weights of a task's own test images vanish without it.
        calibration: ``absolute`` puts log densities into the weight as they are (published, for features of width 512);
            ``held_out`` first takes off their mean over held-out images of the chosen task and divides by their standard
            deviation there.
        weight_scale, weight_offset: of the weight ``w = sigmoid(e / weight_scale - weight_offset)``.
        scope: ``sample`` decides for each image alone; ``batch`` takes the prompts that most images of the evaluation batch
            ask for and the mean of their weights for the texts, as published, which uses that a batch holds one data set only.
        text_levels: in ``sample`` scope class embeddings are computed for this many equal steps of w and interpolated.
    """

    lr: float = 5.0
    batch_size: int = 128
    epochs: int | None = 10
    warmup: int = 0
    label_smoothing: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    depth: int = 8
    prompts: int = 8
    ridge: float = 1e-7
    shrinkage: float = 0.0
    calibration: Literal["absolute", "held_out"] = "absolute"
    weight_scale: float = 512.0
    weight_offset: float = 1.0
    scope: Literal["sample", "batch"] = "sample"
    text_levels: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "optimizer", ("sgd", "adamw"))
        check_field(self, "calibration", ("absolute", "held_out"))
        check_field(self, "scope", ("sample", "batch"))
        for name in ("depth", "prompts", "ridge", "weight_scale", "text_levels"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 <= self.shrinkage < 1:
            raise ValueError(f"shrinkage: expected 0 <= value < 1, got {self.shrinkage}")


@dataclass(frozen=True)
class Injected:
    """A batch of images as DIKI sees them.

    Attributes:
        features: (B, d), normalised.
        prompts: (B,) int64, whose prompts each image got; None for the plain encoder.
        weights: (B,) of these prompts; None likewise.
    """

    features: Tensor
    prompts: Tensor | None = None
    weights: Tensor | None = None


class DIKI(Method):
    """``L = CE(s f_t(x) g_t(c)ᵀ, y)`` over the prompts of task t alone, with weight 1; the CLIP weights never change.

    In the first blocks of both towers the prompts of a task are attended to apart from the tokens and the result is added
    (:func:`~cl_methods.components.prompt_attention.residual_prompt_attention`). After a task a Gaussian is fitted to the plain
    encoder's features of its training images. A test image with features f has ``e_t = log N(f; μ_t, Σ_t)``, gets the prompts
    of ``t* = argmax e_t``, and they weigh ``w = sigmoid(e_t* / 512 - 1)``, in both towers: what looks like no learnt task
    sees plain CLIP.

    Class embeddings depend on (t*, w). In ``batch`` scope, as published, one pair holds for the whole batch, and they are
    encoded again for every batch. In ``sample`` scope w differs between images, so embeddings are kept for each prompt on
    a grid of weights, and interpolated along the sphere's chord; the error falls with the square of the grid's step.

    Stored between tasks: prompts, and per task a mean, a whitening matrix and its determinant.

    Source: Tang et al., "Mind the Interference: Retaining Pre-trained Knowledge in Parameter Efficient Continual Learning of
    Vision-Language Models" (DIKI), ECCV 2024.
    """

    name: ClassVar[str] = "diki"
    facts: ClassVar[Facts] = Facts(
        source="Tang et al., ECCV 2024",
        trains="prompts of the task in the first blocks of both towers",
        carries="prompts, a mean and a covariance of image features per task",
        test_time="a guess of the task by density; the rest of the batch if scope is batch",
    )
    Config: ClassVar[type[TrainConfig]] = DIKIConfig
    config: DIKIConfig

    def __init__(self, backbone: Backbone, config: DIKIConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.prompts = MountedPrompts(backbone, depth=config.depth, length=config.prompts)
        self.gaussians = TaskGaussians(backbone.device)
        self.task: int | None = None
        self._training_texts: Tensor | None = None
        self._embeddings: dict[tuple[Any, ...], Tensor] = {}
        self._latest: dict[tuple[str, ...], tuple[int, float, Tensor]] = {}

    def before_task(self, index: int, task: Task) -> None:
        """Draw the task's prompts, with which the model is still the plain one; those before stop training."""
        super().before_task(index, task)
        self.task = index
        self.prompts.add(index + 1)
        self.prompts.requires_grad_(False)
        self.prompts.zero_grad(set_to_none=True)
        for _, value in self.trainable():
            value.requires_grad_(True)
        self._training_texts = self.training_texts(task)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The prompts of the current task.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self.task is None:
            raise RuntimeError("diki: call before_task before asking what trains")
        return self.prompts.of_task(self.task)

    def optimizer(self) -> torch.optim.Optimizer:
        """Plain SGD, or AdamW, over the current task's prompts."""
        if self.config.optimizer == "adamw":
            return super().optimizer()
        parameters = [value for _, value in self.trainable()]
        return torch.optim.SGD(parameters, lr=self.config.lr, weight_decay=self.config.weight_decay)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss"}``: the cross-entropy; the plain encoder, whose features only the test needs, does not run.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self.task is None or self._training_texts is None:
            raise RuntimeError("diki: call before_task before the first step")
        with self.prompts.active(self.task):
            features = self.backbone.encode_images(batch.images)
            texts = self.backbone.encode_texts(self._training_texts, trimmed=True)
        logits = self.backbone.logit_scale * features @ texts.T
        return {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)}

    @torch.no_grad()
    def after_task(self, index: int, task: Task) -> None:
        """Fit the task's Gaussian; its prompts are used from now on."""
        super().after_task(index, task)
        train, held_out = task.train, None
        if self.config.calibration == "held_out":
            train, held_out = with_held_out(train, task.validation)
        features = encode_source(self.backbone, train)
        self.gaussians.add(*fit_gaussian(features, self.config.ridge, self.config.shrinkage))
        if held_out is not None:
            self.gaussians.calibrate(encode_source(self.backbone, held_out))

    def injection(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Which prompts, and how much of them, before any decision for a whole batch.

        Args:
            features: (B, d) of the plain image encoder.

        Returns:
            Prompts (B,) int64 and weights (B,) in (0, 1).
        """
        density, prompts = self.gaussians.log_prob(features).max(dim=1)
        mean, deviation = self.gaussians.typical[prompts].unbind(dim=1)
        return prompts, torch.sigmoid(
            (density - mean) / deviation / self.config.weight_scale - self.config.weight_offset
        )

    @torch.no_grad()
    def image_features(self, images: ImageBatch) -> Injected:
        """Features of the images with the prompts that are found for them; plain ones before the first task has been learnt."""
        plain = images.frozen(PLAIN, self.backbone.encode_images)
        if not len(self.gaussians):
            return Injected(plain)
        prompts, weights = self.injection(plain)
        if self.config.scope == "batch":
            prompts = prompts.bincount(minlength=len(self.gaussians)).argmax().expand(len(prompts))
        with self.prompts.active(prompts, weights):
            return Injected(self.backbone.encode_images(images.pixels()), prompts, weights)

    def feature_scores(self, features: Injected, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores; zero-shot before the first task has been learnt."""
        injected, prompts, weights = features.features, features.prompts, features.weights
        if prompts is None or weights is None:
            return super().feature_scores(injected, tasks)
        scale = self.backbone.logit_scale
        if self.config.scope == "batch":
            chosen, weight = int(prompts[0]), float(weights.mean())
            return [scale * injected @ self._texts_of_batch(task, chosen, weight).T for task in tasks]
        return [scale * self._interpolated(injected, task, prompts, weights) for task in tasks]

    def _texts(self, task: Task, prompt: int, weight: float) -> Tensor:
        """Class embeddings (C, d) of ``task`` with a prompt and a weight."""
        if weight == 0:
            return self.classifier(task)
        with self.prompts.active(prompt, weight):
            return self.backbone.class_embeddings(task.class_names, task.templates)

    def _texts_of_batch(self, task: Task, prompt: int, weight: float) -> Tensor:
        """:meth:`_texts`; the latest of each label space are kept, for batches that ask for the same again."""
        names = (*task.class_names, "", *task.templates)
        if self._latest.get(names, ())[:2] != (prompt, weight):
            self._latest[names] = (prompt, weight, self._texts(task, prompt, weight))
        return self._latest[names][2]

    def _interpolated(self, features: Tensor, task: Task, prompts: Tensor, weights: Tensor) -> Tensor:
        """Cosines (B, C) with the class embeddings at each image's own prompt and weight."""
        levels = self.config.text_levels
        position = weights * levels
        lower = position.floor().clamp(max=levels - 1)
        share = (position - lower)[:, None]
        places = prompts * levels + lower.long()
        cosines = features.new_empty(len(features), len(task.class_names))
        for place in places.unique().tolist():
            rows = (places == place).nonzero().squeeze(1)
            prompt, level = divmod(place, levels)
            low, high = self._texts_at(task, prompt, level), self._texts_at(task, prompt, level + 1)
            part, some = share[rows].to(features.dtype), features[rows]
            apart = 1 - (low * high).sum(dim=1)
            mixed = (1 - part) * (some @ low.T) + part * (some @ high.T)
            cosines[rows] = mixed / (1 - 2 * part * (1 - part) * apart).sqrt()
        return cosines

    def _texts_at(self, task: Task, prompt: int, level: int) -> Tensor:
        """:meth:`_texts` at a point of the grid; a learnt task's prompts never change, so they are kept for good."""
        key = (prompt, level, *task.class_names, "", *task.templates)
        if key not in self._embeddings:
            self._embeddings[key] = self._texts(task, prompt, level / self.config.text_levels)
        return self._embeddings[key]

    def forget_classifiers(self) -> None:
        """Nothing to forget: the towers and the prompts of learnt tasks stay what they are."""

    def state_dict(self) -> dict[str, Tensor]:
        """Prompts (``prompts.``) and Gaussians (``gaussians.``); the CLIP weights are never changed and not included."""
        state = {f"prompts.{name}": value for name, value in self.prompts.state_dict().items()}
        return state | {f"gaussians.{name}": value for name, value in self.gaussians.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict` into an instance that may have learnt less.

        Raises:
            RuntimeError: the state is not one of this method with these settings.
        """
        parts: dict[str, dict[str, Tensor]] = {"prompts": {}, "gaussians": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise RuntimeError(f"state: {name!r} is no tensor of diki")
            parts[part][rest] = value
        with torch.random.fork_rng(devices=[]):
            self.prompts.add(1 + max((int(name.rpartition(".")[2]) for name in parts["prompts"]), default=-1))
        self.prompts.load_state_dict(parts["prompts"])
        self.gaussians.load(parts["gaussians"])
        self._embeddings.clear()
        self._latest.clear()

"""PROOF: projections of frozen features that add up over tasks, fused with texts, prototypes and prompts by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.backbone import Backbone
from cl_methods.checks import check_field
from cl_methods.components.cross_modal_fusion import Shared
from cl_methods.components.exemplars import ExemplarMemory, Exemplars, encode_source, herding
from cl_methods.components.image_batch import ImageBatch
from cl_methods.components.learnt_classes import LearntClasses
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.keeping_images import KeepsImages
from cl_methods.methods.proof_network import ProofNetwork

_PARTS = ("memory", "network", "classes")


@dataclass(frozen=True)
class PROOFConfig(TrainConfig):
    """Settings of :class:`TrainConfig`, of the memory and of the network; the published class-incremental ones by default.

    Attributes:
        optimizer: ``sgd`` with momentum, or ``adamw`` with ``betas``.
        momentum: of SGD.
        memory: images of all earlier tasks together, the same number for every class.
        memory_per_class: at most so many images of a class, from the first task on; None for no such bound.
        prompts: context prompts that each task adds.
        dropout: of attention weights and outputs of the fusion. 0 makes a step far cheaper, since what the images of a batch
            have in common is then computed once.
        train_old_texts: go on training the text projections of earlier tasks, as the public code does; the paper freezes them.
        normalise_test_images: normalise projected images at test as in training. The public code does not.
        scope: what the fused texts and prototypes that a test image is compared with depend on: that image alone
            (``sample``), or all images of the test batch, over which the public code averages (``batch``).
    """

    lr: float = 1e-3
    warmup: int = 0
    label_smoothing: float = 0.0
    weight_decay: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    memory: int = 2000
    memory_per_class: int | None = None
    prompts: int = 3
    dropout: float = 0.1
    train_old_texts: bool = False
    normalise_test_images: bool = True
    scope: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "optimizer", ("sgd", "adamw"))
        check_field(self, "scope", ("sample", "batch"))
        for name in ("memory", "memory_per_class", "prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        for name in ("momentum", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {getattr(self, name)}")


class PROOF(KeepsImages):
    """``L = CE(ĩ·t̃) + CE(ĩ·p̃) + CLIP(f̃, t̃_y)``, then ``argmax f̃·t̄ + ĩ·t̃ + ĩ·p̃`` over all learnt classes.

    f̃ and t̄ are image and text features through a sum of one projection per task, normalised; prototypes are the class means
    of frozen image features and go through the image projections. ĩ, t̃, p̃ are what attention over an image, all classes' texts
    and prototypes, and context prompts makes of them (:class:`~cl_methods.components.cross_modal_fusion.CrossModalFusion`).
    CLIP stays frozen: texts are encoded once per class, prototypes and herding need one pass over a task's images.

    Learnt classes are known by name, whatever task asks for them. Classes that were not learnt keep their zero-shot score;
    where both kinds compete, what zero-shot CLIP gives to the learnt classes together is shared out among them.

    Source: Zhou et al., "Learning without forgetting for vision-language models", TPAMI 2025.
    """

    name: ClassVar[str] = "proof"
    facts: ClassVar[Facts] = Facts(
        source="Zhou et al., TPAMI 2025",
        trains="a projection per modality, context prompts, one attention layer",
        carries="images of earlier tasks, one mean and one text feature per class",
        test_time="nothing; the rest of the test batch if scope is batch",
    )
    Config: ClassVar[type[TrainConfig]] = PROOFConfig
    frozen_images: ClassVar[bool] = True
    config: PROOFConfig

    def __init__(self, backbone: Backbone, config: PROOFConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.memory, self.classes = ExemplarMemory(config.memory), LearntClasses(backbone)
        self.network: ProofNetwork | None = None
        self._features: Tensor | None = None
        self._compared: tuple[Tensor, Shared] | None = None

    def before_task(self, index: int, task: Task) -> None:
        """Take in the task's classes with texts and prototypes, and add projections and prompts for it.

        Raises:
            ValueError: the memory is too small for the classes.
            RuntimeError: a state was loaded without :meth:`recall`.
        """
        self.memory.check(index, task)
        super().before_task(index, task)
        self._features = encode_source(self.backbone, task.train).float()
        self.classes.add(task, self._features)
        self.network = self.network or self._new_network(self._features.shape[1])
        self.network.extend(self.config.prompts, train_old_texts=self.config.train_old_texts)
        self.network.train()

    def _new_network(self, width: int) -> ProofNetwork:
        log_scale = float(self.backbone.model.logit_scale)
        return ProofNetwork(width, self.config.dropout, log_scale).to(self.backbone.device)

    def _present(self) -> ProofNetwork:
        if self.network is None:
            raise RuntimeError("proof: call before_task first")
        return self.network

    def training_images(self, task: Task) -> ImageSource:
        """The task's images and those of the memory, labelled by their rows among all classes seen."""
        tasks, indices = [*self.memory.tasks, task], [*self.memory.indices, torch.arange(len(task.train))]
        source = Exemplars(tasks, indices)
        source.labels = torch.cat(
            [
                self.classes.rows(known.class_names)[known.train.labels[chosen]]
                for known, chosen in zip(tasks, indices, strict=True)
            ]
        )
        return source

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The newest projections and prompts, the fusion and the logit scale.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        return list(self._present().named_parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum or AdamW; text projections that all train move together, as their sum."""
        config, network = self.config, self._present()
        together = network.text.projections if config.train_old_texts else 1
        texts = list(network.text.parameters())
        others = [value for name, value in network.named_parameters() if not name.startswith("text.")]
        groups: list[dict[str, Any]] = [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": texts, "weight_decay": config.weight_decay / together, "lr_scale": together},
        ]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "text", "prototype", "contrast"}`` for ``batch.labels`` that are rows among all classes seen.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        network, labels = self._present(), batch.labels
        with torch.no_grad():
            features = self.backbone.encode_images(batch.images, normalise=False).float()
        prototypes = self.classes.prototypes()
        projected = F.normalize(network.image(torch.cat([features, prototypes])), dim=1)
        images, prototypes = projected.split([len(features), len(prototypes)])
        texts = F.normalize(network.text(self.classes.texts), dim=1)
        fused = network.fusion(images, texts, prototypes, network.context())
        contrast = network.log_scale.exp() * images @ texts[labels].T
        pairs = torch.arange(len(labels), device=labels.device)
        terms = {
            "text": self._cross_entropy(fused.images @ fused.texts.T, labels),
            "prototype": self._cross_entropy(fused.images @ fused.prototypes.T, labels),
            "contrast": (F.cross_entropy(contrast, pairs) + F.cross_entropy(contrast.T, pairs)) / 2,
        }
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def after_task(self, index: int, task: Task) -> None:
        """Fill the memory by herding on the frozen features."""
        super().after_task(index, task)
        assert self._features is not None
        features, bound = self._features, self.config.memory_per_class

        def select(rows: Tensor, count: int) -> Tensor:
            return rows[herding(features[rows.to(features.device)], count if bound is None else min(count, bound))]

        self.memory.add(task, select)
        self._features = None
        self._present().eval()

    def before_evaluation(self) -> None:
        """Evaluation mode of CLIP and of the network."""
        super().before_evaluation()
        if self.network is not None:
            self.network.eval()

    def image_features(self, images: ImageBatch) -> Tensor:
        """The frozen encoder's features (B, d), not normalised."""
        return images.frozen("not normalised", lambda pixels: self.backbone.encode_images(pixels, normalise=False))

    def feature_scores(self, features: Tensor, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores of ``features`` (B, d), not normalised; of learnt classes they do not depend on what else is asked."""
        scale, unit = self.backbone.logit_scale, features / features.norm(dim=-1, keepdim=True)
        found = super().feature_scores(unit, tasks)
        places = [[place for place, name in enumerate(task.class_names) if name in self.classes] for task in tasks]
        if any(places):
            share = F.log_softmax(self.head_scores(features.float()), dim=1)
            whole = torch.logsumexp(scale * unit.float() @ self.classes.zero_shot().T, dim=1, keepdim=True)
            for logits, task, learnt in zip(found, tasks, places, strict=True):
                rows = self.classes.rows(tuple(task.class_names[place] for place in learnt))
                logits[:, learnt] = (whole + share)[:, rows.to(share.device)].to(logits.dtype)
        return found

    def head_scores(self, features: Tensor) -> Tensor:
        """``f̃·t̄ + ĩ·t̃ + ĩ·p̃`` (B, C) of frozen, not normalised image ``features`` (B, d) with all C learnt classes."""
        network = self._present()
        if self._compared is None:
            texts = self.classes.ensemble(network.text)
            prototypes = F.normalize(network.image(self.classes.prototypes()), dim=1)
            self._compared = texts, network.fusion.shared(texts, prototypes, network.context())
        texts, shared = self._compared
        images = network.image(features)
        if self.config.normalise_test_images:
            images = F.normalize(images, dim=1)
        return images @ texts.T + network.fusion.scores(images, shared, per_image=self.config.scope == "sample")

    def forget_classifiers(self) -> None:
        """Projected texts change with the network; zero-shot embeddings stay, since the towers are frozen."""
        self._compared = None

    def state_dict(self) -> dict[str, Tensor]:
        """``memory.`` indices, ``classes.`` names, texts and sums of features, and the ``network.``; no CLIP weights."""
        parts = {"memory": self.memory.state_dict(), "classes": self.classes.state_dict()}
        parts["network"] = self.network.state() if self.network is not None else {}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; between tasks :meth:`recall` must follow.

        Raises:
            RuntimeError: the state is not one of this method.
        """
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part not in parts:
                raise RuntimeError(f"state: {name!r} is no tensor of proof")
            parts[part][rest] = value
        self.memory.load_state_dict(parts["memory"])
        self.classes.load_state_dict(parts["classes"])
        self.forget_classifiers()
        self.network = None
        if parts["network"]:
            self.network = self._new_network(parts["network"]["prompts"].shape[1])
            self.network.load_state(parts["network"])

"""MulKI, reconstructed: prototypes, relations from two teachers, adaptive weights of the teachers, integration of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.components.averages import SnapshotMean
from cl_methods.components.dual_teachers import DualTeachers, feature_distances
from cl_methods.components.exemplars import encode_source
from cl_methods.components.prototypes import class_prototypes, follow, symmetric_alignment
from cl_methods.components.relations import relation_distillation
from cl_methods.components.teacher_weights import teacher_weights
from cl_methods.components.weights import assign, move_towards
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune
from cl_methods.methods.mulki_config import MulKIConfig

_EXTRA = "mulki."


class MulKI(FineTune):
    """``L = L_CE + λ_1 L_CSA + λ_2 Σ_k w_k ||f − f_k||² + λ_3 Σ_k w_k (L_intra + L_inter)``, then an average of models.

    1. *Eliciting*: prototypes, first the class means of the pre-trained model's image features, are aligned with class texts
       (symmetric contrastive loss).
    2. *Adding*: relations of images to prototypes and to each other (intra-modal), and of images and prototypes to class texts
       (inter-modal), are distilled from two teachers, the pre-trained model and the model from before the task.
    3. *Distinguishing*: every sample weighs the two teachers.
    4. *Connecting*: running mean of snapshots within the task, interpolation with the model from before it.

    Only images of the current task are used. While the first task is learnt the teachers are the same, and one is asked.

    This is a reconstruction. Sourced: the four stages, initial prototypes, the two teachers, distillation of features and of
    intra- and inter-modal relations, weights per sample, integration within and between tasks, no other data. The formulas and
    every number are inferred; ``docs/methods/mulki.md`` argues for each choice.

    Source: after Zhang et al., "Multi-stage knowledge integration of vision-language models for continual learning",
    IEEE TIP 2026 (arXiv 2411.06764), whose equations and code are not available.
    """

    name: ClassVar[str] = "mulki"
    facts: ClassVar[Facts] = Facts(
        source="after Zhang et al., TIP 2026 (reconstruction)",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = MulKIConfig
    shards: ClassVar[bool] = False  # prototypes train beside the backbone
    config: MulKIConfig

    def __init__(self, backbone: Backbone, config: MulKIConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        self.teachers = DualTeachers(backbone)
        self.prototypes: Tensor | None = None
        self._scale = float(backbone.logit_scale.detach())
        self._teacher_texts: Tensor | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        self._followed: Tensor | None = None
        self._average: SnapshotMean | None = None

    def before_task(self, index: int, task: Task) -> None:
        """Copy the second teacher, have the teachers encode what is the same in every step, and make the prototypes."""
        super().before_task(index, task)
        config = self.config
        self.teachers.before_task(index, self.backbone)
        assert self._texts is not None
        self._teacher_texts = self._encode_teacher_texts(self._texts)
        fixed_view = config.distils and config.teacher_view == "evaluation"
        asked = self.teachers.models if fixed_view else self.teachers.models[:1] if config.needs_prototypes else ()
        features = [encode_source(teacher, task.train) for teacher in asked]
        labels = task.train.labels.to(self.backbone.device)
        if config.needs_prototypes:
            prototypes = class_prototypes(features[0], labels, self._teacher_texts[0])
            self.prototypes = nn.Parameter(prototypes) if config.prototype_update == "learnable" else prototypes
        if fixed_view:
            views = torch.stack(features)
            self._views = views, self._teacher_weights(views, labels)
        self._average = None
        if config.average_every:
            self._average = SnapshotMean(dict(self._weights()), on_host=self.offload_averages)
        if self.offload_anchors and not config.asks_teachers:
            self.teachers.retire_second()

    def _encode_teacher_texts(self, tokens: Tensor) -> Tensor:
        """Features (K, C, d) of class texts (C, L); a text tower that is frozen is the same for all."""
        if self.config.text_tower == "trained":
            return self.teachers.encode_texts(tokens)
        with torch.no_grad():
            texts = self.backbone.encode_texts(tokens, trimmed=True)
        return texts.expand(len(self.teachers.models), -1, -1)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The towers that train, without the logit scale, and learnable prototypes while a task is learnt."""
        learnt = [("prototypes", self.prototypes)] if isinstance(self.prototypes, nn.Parameter) else []
        return [*self._weights(), *learnt]

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        """What trains and is carried on."""
        frozen = self.config.text_tower == "frozen"
        return [(name, value) for name, value in super().trainable() if not frozen or name.startswith("visual.")]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The total under ``"loss"``, and its terms by name as they enter it.

        Raises:
            RuntimeError: ``before_task`` has not been called.
            ValueError: the batch has no indices, and the teachers' view is that of evaluation.
        """
        if self._texts is None or self._teacher_texts is None:
            raise RuntimeError(f"{self.name}: call before_task before the first step")
        config, texts = self.config, self._teacher_texts[0]
        features = self.backbone.encode_images(batch.images)
        if config.text_tower == "trained":
            texts = self.backbone.encode_texts(self._texts, trimmed=True)
        prototypes = self._present_prototypes(features, batch.labels)
        terms = {"cross_entropy": self.classification(features, batch.labels, texts)}
        if prototypes is not None and config.alignment_weight:
            terms["alignment"] = config.alignment_weight * symmetric_alignment(prototypes, texts, self._scale)
        if config.distils:
            terms.update(self._distillation(batch, features, texts, prototypes))
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _present_prototypes(self, features: Tensor, labels: Tensor) -> Tensor | None:
        """Unit rows (C, d) that the terms of a step with features (B, d) of classes (B,) read."""
        if self.prototypes is None or self.config.prototype_update == "fixed":
            return self.prototypes
        if self.config.prototype_update == "learnable":
            return nn.functional.normalize(self.prototypes, dim=1)
        present = follow(self.prototypes, features, labels, self.config.prototype_momentum)
        self._followed = present.detach()
        return present

    def _distillation(
        self, batch: Batch, features: Tensor, texts: Tensor, prototypes: Tensor | None
    ) -> dict[str, Tensor]:
        """Stages 2 and 3: what two teachers say of features (B, d), class texts (C, d) and prototypes (C, d)."""
        config, terms = self.config, {}
        teachers, weights = self._teachers_of(batch)
        teacher_texts = self._teacher_texts
        assert teacher_texts is not None
        if config.feature_weight:
            distances = feature_distances(features, teachers, config.feature_distance)
            terms["feature"] = config.feature_weight * (weights * distances).sum() / len(features)
        if not config.relation_weight:
            return terms
        options: dict[str, Any] = {"scale": self._scale, "temperature": config.temperature}
        both = {**options, "columns": config.relation_columns}
        relations = {}
        if config.image_prototype_relation:
            assert prototypes is not None
            relations["image_prototype"] = relation_distillation(
                features, prototypes, teachers, prototypes, weights, **both
            )
        if config.image_image_relation:
            relations["image_image"] = relation_distillation(
                features, features, teachers, teachers, weights, among_themselves=True, **options
            )
        if config.image_text_relation:
            relations["image_text"] = relation_distillation(features, texts, teachers, teacher_texts, weights, **both)
        if config.relates_prototypes_to_texts:
            assert prototypes is not None
            seen, shares = prototypes.expand(len(teachers), -1, -1), weights.mean(dim=1, keepdim=True)
            relations["prototype_text"] = relation_distillation(
                prototypes, texts, seen, teacher_texts, shares.expand(-1, len(texts)), **options
            )
        return {**terms, **{name: config.relation_weight * value for name, value in relations.items()}}

    def _teachers_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teachers' features (K, B, d) of a batch, and their weights (K, B)."""
        if self._views is None:
            teachers = self.teachers.encode_images(batch.images)
            return teachers, self._teacher_weights(teachers, batch.labels)
        if batch.indices is None:
            raise ValueError("batch: expected indices for teacher_view='evaluation', got None")
        rows = batch.indices.to(self.backbone.device, non_blocking=True)
        features, weights = self._views
        return features[:, rows], weights[:, rows]

    def _teacher_weights(self, teachers: Tensor, labels: Tensor) -> Tensor:
        """Weights (K, N) of teachers with features (K, N, d) for samples of the classes ``labels`` (N,)."""
        config = self.config
        assert self._teacher_texts is not None
        logits = self._scale * teachers @ self._teacher_texts.mT
        return teacher_weights(
            config.teacher_weighting,
            teachers,
            logits,
            labels,
            temperature=config.weighting_temperature,
            threshold=config.threshold,
            sharpness=config.sharpness,
        )

    def after_step(self, step: int) -> None:
        """Let the prototypes follow; every ``average_every`` steps, the first included, take a snapshot into the mean."""
        super().after_step(step)
        if self._followed is not None:
            self.prototypes, self._followed = self._followed, None
        if self._average is not None and step % self.config.average_every == 0:
            self._average.update(self._weights())

    def averaged_weights(self) -> dict[str, Tensor]:
        """The mean of start and snapshots."""
        return {} if self._average is None else self._average.tensors

    def anchors(self) -> list[Mapping[str, Tensor]]:
        """The model from before the task, where it has said all in advance."""
        held = {} if self.config.asks_teachers else self.teachers.second
        return [held] if held else []

    def after_task(self, index: int, task: Task) -> None:
        """Keep the mean, merged with the weights from before the task; drop what only the task needed."""
        parameters = self._weights()
        if self._average is not None:
            assign(parameters, self._average.tensors)
        if self.config.inter_task_share < 1:
            move_towards(parameters, self.teachers.start, 1 - self.config.inter_task_share)
        super().after_task(index, task)
        self.teachers.after_task()
        self.prototypes, self._teacher_texts, self._views, self._followed, self._average = None, None, None, None, None

    def forget_classifiers(self) -> None:
        """Drop the class embeddings, unless the text tower is frozen."""
        if self.config.text_tower == "trained":
            super().forget_classifiers()

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``mulki.`` prototypes and mean of a task that has begun."""
        extra = {f"ensemble.{name}": value for name, value in self.averaged_weights().items()}
        if self.prototypes is not None:
            extra["prototypes"] = self.prototypes.detach()
        extra["snapshots"] = torch.tensor(0 if self._average is None else self._average.snapshots)
        return {**super().state_dict(), **{_EXTRA + name: value for name, value in extra.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a plain model state is a state between tasks.

        Raises:
            RuntimeError: the state comes from another configuration or another task.
        """
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_EXTRA)})
        self._classifiers.clear()
        extra = {name[len(_EXTRA) :]: value for name, value in state.items() if name.startswith(_EXTRA)}
        snapshots = int(extra.pop("snapshots", 0))
        stored = {f"ensemble.{name}": value for name, value in self.averaged_weights().items()}
        if self.prototypes is not None:
            stored["prototypes"] = self.prototypes
        shapes = [{name: value.shape for name, value in found.items()} for found in (extra, stored)]
        if extra and shapes[0] != shapes[1]:
            raise RuntimeError(
                "state: it holds another task's mean or prototypes; was before_task called for this task?"
            )
        for name, value in extra.items():
            stored[name].copy_(value)
        if self._average is not None:
            self._average.snapshots = snapshots

"""ZSCL: distil from the zero-shot model on reference data, consolidate weights, average snapshots. All its ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

import cl_kernels as clk
from cl_methods.backbone import Backbone
from cl_methods.components.averages import SnapshotMean
from cl_methods.components.reference_features import FrozenFeatures, random_texts
from cl_methods.components.teacher_features import TeacherFeatures
from cl_methods.components.weights import (
    assign,
    consolidation_value,
    fold_consolidation_gradient,
    move_towards,
    sharing,
    snapshot,
)
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune
from cl_methods.methods.zscl_config import ZSCLConfig

_EXTRA = "zscl."


class ZSCL(FineTune):
    """``L = L_CE + λ Σ||θ − θ_start||² + KD(Z_t, Z_s) + KD(Z_tᵀ, Z_sᵀ)``, then the mean of weight snapshots.

    ``Z = s F Uᵀ`` with reference image features F of student or teacher and the *teacher's* text features U; KD is
    ``T²`` times the cross-entropy of teacher and student soft-max at temperature T. Teacher text features are computed once
    per teacher, teacher image features once per image; current and reference images share one student pass.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models",
    ICCV 2023, equations 3 to 7, with the details of its public code. No distillation gradient reaches the text tower.

    Raises:
        ValueError: the scenario lacks reference images or captions that the configuration asks for.
    """

    name: ClassVar[str] = "zscl"
    facts: ClassVar[Facts] = Facts(
        source="Zheng et al., ICCV 2023",
        trains="all of CLIP but the logit scale",
        carries="features of the zero-shot model on a reference set",
    )
    Config: ClassVar[type[TrainConfig]] = ZSCLConfig
    config: ZSCLConfig

    def __init__(self, backbone: Backbone, config: ZSCLConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        self.uses_reference = config.distils
        self._caption_tokens: Tensor | None = None
        self._check_reference()
        self._zero_shot = backbone.frozen_copy() if config.needs_zero_shot else None
        self._teacher = self._zero_shot if config.teacher == "zero_shot" else None
        self._teacher_texts: Tensor | None = None
        self._reference_tokens: Tensor | None = None
        self._kept = self._kept_features()
        images = self._kept.images(reference.images) if self._kept is not None and reference is not None else None
        self._teacher_images = FrozenFeatures(self._encode_with_teacher, backbone.device, images)
        self._scale = float(backbone.logit_scale.detach())
        self._start: dict[str, Tensor] = {}
        self._average: SnapshotMean | None = None
        self._pulled: dict[str, Tensor] = {}

    def _check_reference(self) -> None:
        config = self.config
        if not config.distils:
            return
        if config.reference_images == "reference" and (self.reference is None or not self.reference.has_images):
            raise ValueError(
                "reference_images: this scenario has no reference set to distil on (scenario folders takes it from the "
                "folder _reference in data.root); "
                "set reference_images='task' and reference_texts='classes' to distil on each task's own data (LwF)"
            )
        if config.reference_texts != "captions":
            return
        if self.reference is None or not (self.reference.captions or self.reference.random_texts):
            raise ValueError(
                "reference_texts: this scenario has no captions; expected 'random' or 'classes' instead of 'captions'"
            )
        self._caption_tokens = self._tokens_of(
            self.reference
        )  # a text that no tokenizer takes shows before anything is trained

    def _tokens_of(self, reference: Reference) -> Tensor:
        random = reference.random_texts
        if random is not None:
            return random_texts(self.backbone, random.count, random.length, random.seed)
        return self.backbone.tokenize(reference.captions)

    def _kept_features(self) -> TeacherFeatures | None:
        """Where features of the zero-shot teacher on the reference data are kept between runs."""
        config, reference = self.config, self.reference
        if not (config.distils and config.teacher == "zero_shot" and config.reference_images == "reference"):
            return None
        if reference is None or reference.features is None or self._teacher is None:
            return None
        return TeacherFeatures(reference.features, self._teacher)

    def reference_source(self, task: Task) -> ImageSource | None:
        """The reference set, or the task's own training images."""
        if not self.uses_reference:
            return None
        return task.train if self.config.reference_images == "task" else super().reference_source(task)

    def before_task(self, index: int, task: Task) -> None:
        """Copy the weights that the task starts from, and prepare the teacher and its text features."""
        super().before_task(index, task)
        self._task = task
        config, parameters = self.config, self.trainable()
        self._start = snapshot(parameters) if config.needs_start else {}
        self._average = None
        if config.ensemble != "none" and not self._start:
            self._average = self._new_average(dict(parameters))
        self._pulled = snapshot(parameters) if config.moving_average == "previous" else {}
        if config.distils:
            self._prepare_teacher(index, task)
        self._share_start()

    def _new_average(self, start: Mapping[str, Tensor]) -> SnapshotMean:
        return SnapshotMean(start, on_host=self.offload_averages)

    def _share_start(self) -> None:
        """Keep the start of the task once where the teacher has the same weights: the previous model, or in the first task any."""
        if self._teacher is None or not self._start or self.backbone.sharded is not None:
            return  # of sharded weights it has some rows, the teacher all
        teacher = dict(self._teacher.model.named_parameters())
        if self.config.teacher == "previous":
            self._start = {name: teacher[name].detach() for name in self._start}
        else:
            self._start = sharing(self._start, teacher)

    def _prepare_teacher(self, index: int, task: Task) -> None:
        config = self.config
        if config.teacher != "zero_shot":
            self._teacher = self.backbone.frozen_copy()
            self._teach_from_start()
        if config.teacher != "zero_shot" or config.reference_images == "task":
            self._teacher_images.clear()
        constant = config.teacher == "zero_shot" and config.reference_texts != "classes"
        if self._teacher_texts is None or not constant:
            self._encode_reference_texts()

    def _teach_from_start(self) -> None:
        """Give a teacher other than the zero-shot one its weights: the task's start, or a mix of it and zero-shot."""
        assert self._teacher is not None
        teacher = [(name, value) for name, value in self._teacher.model.named_parameters() if name in self._start]
        assign(teacher, self._start)
        if self.config.teacher == "mixed":
            move_towards(teacher, self._weights("zero_shot"), 1 - self.config.teacher_mix)

    def _encode_reference_texts(self) -> None:
        assert self._teacher is not None
        self._reference_tokens = self.reference_tokens(self._task)
        if self._kept is not None and self.config.reference_texts != "classes":
            self._teacher_texts = self._kept.texts(self._reference_tokens)
        else:
            self._teacher_texts = self._teacher.frozen_text_features(self._reference_tokens)

    def reference_tokens(self, task: Task) -> Tensor:
        """Token ids (M, L) of the texts against which image features are distilled."""
        kind = self.config.reference_texts
        if kind == "random":
            return random_texts(self.backbone)
        if kind == "classes":
            return self.training_texts(task)
        assert self._caption_tokens is not None
        return self._caption_tokens

    @torch.no_grad()
    def _encode_with_teacher(self, images: Tensor) -> Tensor:
        assert self._teacher is not None
        return self._teacher.encode_images(images)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The total under ``"loss"`` and its terms by name, each as it enters the total but ``consolidation`` (unweighted).

        The value of the weight consolidation is part of the total; its gradient is added in :meth:`before_step`.
        """
        terms: dict[str, Tensor] = {}
        if self.config.distils:
            if batch.reference_images is None:
                raise ValueError("batch: expected reference_images, got None")
            images = torch.cat([batch.images, batch.reference_images])
            features, student = self.backbone.encode_images(images).split(
                [len(batch.images), len(images) - len(batch.images)]
            )
            terms.update(self._distillation(student, batch))
        else:
            features = self.backbone.encode_images(batch.images)
        terms["cross_entropy"] = self.cross_entropy(features, batch.labels, self._texts)
        total = torch.stack(list(terms.values())).sum()
        if self.config.consolidation:
            terms["consolidation"] = consolidation_value(self.trainable(), self._start)
            total = total + self.config.consolidation * terms["consolidation"]
        return {"loss": total, **terms}

    def _distillation(self, student: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms that compare student and teacher features (N, d) of the reference images."""
        config, terms = self.config, {}
        teacher = self.teacher_features(student, batch)
        assert self._teacher_texts is not None
        if config.image_loss or config.text_loss:
            terms["distillation"] = clk.feature_distill_kl(
                student,
                teacher,
                self._teacher_texts,
                logit_scale=self._scale,
                temperature=config.temperature,
                rows=config.distillation_weight * config.image_loss,
                columns=config.distillation_weight * config.text_loss,
            )
        if config.text_tower_loss:
            terms["text_tower"] = self._text_tower_distillation(teacher)
        if config.feature_mse:
            terms["feature_mse"] = (teacher - student).square().mean()
        if config.relation_loss:
            terms["relation"] = config.distillation_weight * self.relation_distillation(student, teacher)
        return terms

    def teacher_features(self, student: Tensor, batch: Batch) -> Tensor:
        """The teacher's features of the reference images, in the shape (N, d) of the ``student``'s, without gradient."""
        assert batch.reference_images is not None
        return self._teacher_images.get(batch.reference_images, batch.reference_indices)

    def relation_distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distillation of the similarities ``s F Fᵀ`` of features (N, d) among themselves, an image with itself left out."""
        return clk.feature_distill_kl(
            student,
            teacher,
            student,
            teacher_anchors=teacher,
            logit_scale=self._scale,
            temperature=self.config.temperature,
            columns=0.0,
            mask_diagonal=True,
        )

    def _text_tower_distillation(self, teacher_images: Tensor) -> Tensor:
        """The published terms with the roles of the towers swapped: student and teacher texts against teacher images (N, d)."""
        config = self.config
        assert self._teacher_texts is not None
        assert self._reference_tokens is not None
        chosen = torch.randperm(len(self._reference_tokens))[: config.text_batch_size]
        return clk.feature_distill_kl(
            self.backbone.encode_texts(self._reference_tokens[chosen]),
            self._teacher_texts[chosen.to(self._teacher_texts.device)],
            teacher_images,
            logit_scale=self._scale,
            temperature=config.temperature,
            rows=config.distillation_weight,
            columns=config.distillation_weight,
        )

    def before_step(self, batch: Batch) -> None:
        """Add the gradient of the weight consolidation in closed form."""
        super().before_step(batch)
        if self.config.consolidation:
            fold_consolidation_gradient(self.trainable(), self._start, self.config.consolidation)

    def after_step(self, step: int) -> None:
        """Every ``average_every`` steps, the first included: pull the weights, take a snapshot into the mean."""
        super().after_step(step)
        config = self.config
        if step % config.average_every:
            return
        parameters = self.trainable()
        if config.moving_average != "none":
            self._pull(parameters)
        if config.ensemble != "none":
            if self._average is None:  # until the first snapshot the start of the task is its mean
                self._average = self._new_average(self._start)
            pull = 1 - config.ensemble_wise_alpha if config.ensemble == "wise" else 0.0
            self._average.update(parameters, self._start, pull)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The ensemble."""
        return {} if self._average is None else self._average.tensors

    def _pull(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        towards = self.config.moving_average
        target = self._pulled if towards == "previous" else self._weights(towards)
        unpulled = snapshot(parameters) if towards == "previous" else {}
        move_towards(parameters, target, 1 - self.config.moving_average_decay)
        self._pulled = unpulled

    def after_task(self, index: int, task: Task) -> None:
        """Keep the ensemble, or the merged weights, or the last ones; drop what only the task needed."""
        config, parameters = self.config, self.trainable()
        if config.wise_merge != "none":
            move_towards(parameters, self._weights(config.wise_merge), 1 - config.wise_merge_alpha)
        if self._average is not None:
            assign(parameters, self._average.tensors)
        self._start, self._average, self._pulled = {}, None, {}
        super().after_task(index, task)

    def _weights(self, which: str) -> Mapping[str, Tensor]:
        """Weights at the ``start`` of the task, or of the ``zero_shot`` model."""
        if which == "start":
            return self._start
        assert self._zero_shot is not None
        return dict(self._zero_shot.model.named_parameters())

    def carried_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model: features of reference images belong to the run's own reference data."""
        return {name: value for name, value in state.items() if not name.startswith(_EXTRA)}

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``zscl.`` what a started task and the caches hold."""
        state = super().state_dict()
        for part, weights in self._parts().items():
            state.update({f"{_EXTRA}{part}.{name}": value for name, value in weights.items()})
        state.update({f"{_EXTRA}images.{name}": value for name, value in self._teacher_images.state_dict().items()})
        state[f"{_EXTRA}snapshots"] = torch.tensor(0 if self._average is None else self._average.snapshots)
        return state

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"start": self._start, "ensemble": self.averaged_weights(), "pulled": self._pulled}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a plain model state is a state between tasks.

        Raises:
            RuntimeError: the state comes from another configuration.
        """
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_EXTRA)})
        extra = {name[len(_EXTRA) :]: value for name, value in state.items() if name.startswith(_EXTRA)}
        if self.config.ensemble != "none" and self._start and any(name.startswith("ensemble.") for name in extra):
            self._average = self._new_average(self._start)
        self._start = {name: value.clone() for name, value in self._start.items()}  # which a teacher may share
        for part, weights in self._parts().items():
            stored = {name[len(part) + 1 :]: value for name, value in extra.items() if name.startswith(part + ".")}
            if stored and stored.keys() != weights.keys():
                raise RuntimeError(f"state: {part} weights do not fit; was before_task called with this configuration?")
            if stored:
                assign(list(weights.items()), stored)
        if self._average is not None:
            self._average.snapshots = int(extra.get("snapshots", 0))
        if self.config.distils and self.config.teacher != "zero_shot" and self._start:
            self._teach_from_start()
            self._encode_reference_texts()
        self._share_start()
        images = {name[len("images.") :]: value for name, value in extra.items() if name.startswith("images.")}
        self._teacher_images.load_state_dict(images)

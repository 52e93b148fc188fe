"""ZSCL: distil from the zero-shot model on reference data, consolidate weights, average snapshots. All its ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

import cl_kernels as clk
from cl_methods.backbone import Backbone
from cl_methods.components.frozen_teacher import FrozenTeacher
from cl_methods.components.host_weights import HostWeights, all_weights, give_up_module
from cl_methods.components.reference_features import random_texts
from cl_methods.components.task_weights import TaskWeights
from cl_methods.components.weights import assign, consolidation_value, fold_consolidation_gradient, move_towards
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
        config.check_reference(reference)
        self._caption_tokens = self._captions() if config.distils and config.reference_texts == "captions" else None
        zero_shot = backbone.frozen_copy() if config.needs_zero_shot else None
        self._zero_shot: Mapping[str, Tensor] = {} if zero_shot is None else all_weights(zero_shot.model)
        self.teacher = self._first_teacher(zero_shot)
        self.weights = TaskWeights()
        self._reference_tokens: Tensor | None = None
        self._scale = float(backbone.logit_scale.detach())

    def _captions(self) -> Tensor:
        """The reference set's texts as tokens: at once, so that one that no tokenizer takes shows before anything is trained."""
        assert self.reference is not None
        random = self.reference.random_texts
        if random is not None:
            return random_texts(self.backbone, random.count, random.length, random.seed)
        return self.backbone.tokenize(self.reference.captions)

    def _first_teacher(self, zero_shot: Backbone | None) -> FrozenTeacher:
        """The zero-shot model where it teaches for the whole run; otherwise one that comes with the first task, if any."""
        device = self.backbone.device
        if not self.config.zero_shot_teaches:
            return FrozenTeacher(device)
        lasting = self.config.reference_images == "reference"
        return FrozenTeacher(device, zero_shot, self.reference if lasting else None)

    def reference_source(self, task: Task) -> ImageSource | None:
        """The reference set, or the task's own training images."""
        if not self.uses_reference:
            return None
        return task.train if self.config.reference_images == "task" else super().reference_source(task)

    def before_task(self, index: int, task: Task) -> None:
        """Copy the weights that the task starts from, and prepare the teacher and its text features."""
        super().before_task(index, task)
        self._task = task
        config = self.config
        self.weights.begin(
            self.trainable(),
            start=config.needs_start,
            mean=config.ensemble != "none",
            pulled=config.moving_average == "previous",
            on_host=self.offload_averages,
            anchors_on_host=self.offload_anchors,
        )
        if self.offload_anchors:
            self._offload_zero_shot()
        if config.distils:
            self._prepare_teacher()
        self._share_start()

    def _offload_zero_shot(self) -> None:
        """Of a zero-shot model that teaches nobody keep the weights on the host."""
        if self._zero_shot and not self.config.zero_shot_teaches and not isinstance(self._zero_shot, HostWeights):
            self._zero_shot = HostWeights(self._zero_shot, self.backbone.device)
            give_up_module()

    def anchors(self) -> list[Mapping[str, Tensor]]:
        """The start of the task, the weights before the last pull, the zero-shot model: none that a teacher holds."""
        others = [] if self.config.zero_shot_teaches or not self._zero_shot else [self._zero_shot]
        return [*self.weights.anchors(), *others]

    def _share_start(self) -> None:
        """Keep the start of the task once where the teacher has the same weights: the previous model, or in the first task any."""
        taught = self.teacher.model is not None
        others = self.teacher.weights if taught else self._zero_shot
        if not others or not self.weights.start or isinstance(others, HostWeights) or self.backbone.sharded is not None:
            return  # of sharded weights the start has some rows, the teacher all
        self.weights.share_start(others, known_equal=taught and self.config.teacher == "previous")

    def _prepare_teacher(self) -> None:
        config = self.config
        if config.teacher != "zero_shot":
            self.teacher.becomes(self.backbone)
            self._teach_from_start()
        elif config.reference_images == "task":
            self.teacher.forget_images()
        constant = config.teacher == "zero_shot" and config.reference_texts != "classes"
        if self.teacher.texts is None or not constant:
            self._encode_reference_texts()

    def _teach_from_start(self) -> None:
        """Give a teacher other than the zero-shot one its weights: the task's start, or a mix of it and zero-shot."""
        start = self.weights.start
        taught = [(name, value) for name, value in self.teacher.weights.items() if name in start]
        assign(taught, start)
        if self.config.teacher == "mixed":
            move_towards(taught, self._weights_of("zero_shot"), 1 - self.config.teacher_mix)

    def _encode_reference_texts(self) -> None:
        self._reference_tokens = self.reference_tokens(self._task)
        self.teacher.encode_texts(self._reference_tokens, lasting=self.config.reference_texts != "classes")

    def reference_tokens(self, task: Task) -> Tensor:
        """Token ids (M, L) of the texts against which image features are distilled."""
        kind = self.config.reference_texts
        if kind == "random":
            return random_texts(self.backbone)
        if kind == "classes":
            return self.training_texts(task)
        assert self._caption_tokens is not None
        return self._caption_tokens

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
            terms["consolidation"] = consolidation_value(self.trainable(), self.weights.start)
            total = total + self.config.consolidation * terms["consolidation"]
        return {"loss": total, **terms}

    def _distillation(self, student: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms that compare student and teacher features (N, d) of the reference images."""
        config, terms = self.config, {}
        teacher = self.teacher_features(student, batch)
        assert self.teacher.texts is not None
        if config.image_loss or config.text_loss:
            terms["distillation"] = clk.feature_distill_kl(
                student,
                teacher,
                self.teacher.texts,
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
        return self.teacher.image_features(batch.reference_images, batch.reference_indices)

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
        assert self.teacher.texts is not None
        assert self._reference_tokens is not None
        chosen = torch.randperm(len(self._reference_tokens))[: config.text_batch_size]
        return clk.feature_distill_kl(
            self.backbone.encode_texts(self._reference_tokens[chosen]),
            self.teacher.texts[chosen.to(self.teacher.texts.device)],
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
            fold_consolidation_gradient(self.trainable(), self.weights.start, self.config.consolidation)

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
            self.weights.take_snapshot(parameters, 1 - config.ensemble_wise_alpha if config.ensemble == "wise" else 0.0)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The ensemble."""
        return self.weights.averaged

    def _pull(self, parameters: list[tuple[str, nn.Parameter]]) -> None:
        towards, weight = self.config.moving_average, 1 - self.config.moving_average_decay
        if towards == "previous":
            self.weights.pull_to_previous(parameters, weight)
        else:
            move_towards(parameters, self._weights_of(towards), weight)

    def after_task(self, index: int, task: Task) -> None:
        """Keep the ensemble, or the merged weights, or the last ones; drop what only the task needed."""
        config, parameters = self.config, self.trainable()
        if config.wise_merge != "none":
            move_towards(parameters, self._weights_of(config.wise_merge), 1 - config.wise_merge_alpha)
        if self.weights.mean is not None:
            assign(parameters, self.weights.averaged)
        self.weights.forget()
        super().after_task(index, task)

    def _weights_of(self, which: str) -> Mapping[str, Tensor]:
        """Weights at the ``start`` of the task, or of the ``zero_shot`` model."""
        if which == "start":
            return self.weights.start
        return self._zero_shot

    def carried_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model: features of reference images belong to the run's own reference data."""
        return {name: value for name, value in state.items() if not name.startswith(_EXTRA)}

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``zscl.`` what a started task and the caches hold."""
        images = {f"images.{name}": value for name, value in self.teacher.state_dict().items()}
        extra = {**self.weights.state_dict(), **images}
        return {**super().state_dict(), **{_EXTRA + name: value for name, value in extra.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a plain model state is a state between tasks.

        Raises:
            RuntimeError: the state comes from another configuration.
        """
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_EXTRA)})
        extra = {name[len(_EXTRA) :]: value for name, value in state.items() if name.startswith(_EXTRA)}
        self.weights.load_state_dict(extra)
        if self.config.distils and self.config.teacher != "zero_shot" and self.weights.start:
            self._teach_from_start()
            self._encode_reference_texts()
        self._share_start()
        images = {name[len("images.") :]: value for name, value in extra.items() if name.startswith("images.")}
        self.teacher.load_state_dict(images)

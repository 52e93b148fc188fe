"""Settings of MulKI: its four stages, each of which can be switched off, and what its sources leave open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cl_methods.checks import check_at_least, check_field, check_fraction
from cl_methods.components.dual_teachers import Distance
from cl_methods.components.teacher_weights import WEIGHTINGS, Weighting
from cl_methods.methods.config import TrainConfig


@dataclass(frozen=True)
class MulKIConfig(TrainConfig):
    """Settings of :class:`TrainConfig` and of the four stages; no value of the paper is known, see ``docs/methods/mulki.md``.

    Attributes:
        text_tower: ``trained`` with the image tower, or ``frozen``: the sources do not say which.
        alignment_weight: of the alignment of prototypes and class texts; 0 switches stage 1 off.
        prototype_update: prototypes move with the student's features (``ema``), are ``learnable``, or stay as the pre-trained
            model gives them (``fixed``).
        prototype_momentum: share of the old prototype when a batch shows its class.
        feature_weight: of the distance to the teachers' image features.
        feature_distance: ``squared`` or the ``norm`` itself.
        relation_weight: of every relation; 0, with ``feature_weight`` 0, switches stage 2 off (and with it stage 3).
        image_prototype_relation: how images stand to prototypes (intra-modal).
        image_image_relation: how the images of a batch stand to each other (intra-modal).
        image_text_relation: how images stand to class texts (inter-modal).
        prototype_text_relation: how prototypes stand to class texts (inter-modal); nothing where texts are frozen.
        relation_columns: factor of the other direction of the first and the third, over the images of each anchor.
        temperature: of the relations.
        teacher_view: teachers see the augmented ``batch``, or the ``evaluation`` view of its images, once per task.
        teacher_weighting: by true-class ``confidence``, by ``entropy``, by ``discrepancy`` (the gate of SnD); ``equal`` switches
            stage 3 off.
        weighting_temperature: of ``confidence`` and ``entropy``.
        threshold, sharpness: of ``discrepancy``.
        average_every: steps between snapshots of the running mean within a task; 0 switches this half of stage 4 off.
        inter_task_share: share of the task's weights when they are merged with those it started from; 1 switches it off.
    """

    text_tower: Literal["trained", "frozen"] = "trained"
    alignment_weight: float = 0.1
    prototype_update: Literal["ema", "learnable", "fixed"] = "ema"
    prototype_momentum: float = 0.9
    feature_weight: float = 3.0
    feature_distance: Distance = "squared"
    relation_weight: float = 0.03
    image_prototype_relation: bool = True
    image_image_relation: bool = False
    image_text_relation: bool = True
    prototype_text_relation: bool = True
    relation_columns: float = 0.0
    temperature: float = 2.0
    teacher_view: Literal["batch", "evaluation"] = "evaluation"
    teacher_weighting: Weighting = "confidence"
    weighting_temperature: float = 0.1
    threshold: float = 0.2
    sharpness: float = 6.0
    average_every: int = 100
    inter_task_share: float = 0.5

    @property
    def distils(self) -> bool:
        """Whether the teachers are asked."""
        return self.feature_weight > 0 or self.relates

    @property
    def asks_teachers(self) -> bool:
        """Whether they are asked in the steps, not once per task in advance."""
        return self.distils and self.teacher_view == "batch"

    @property
    def relates(self) -> bool:
        """Whether any relation is distilled."""
        kinds = (self.image_prototype_relation, self.image_image_relation, self.image_text_relation)
        return self.relation_weight > 0 and any((*kinds, self.relates_prototypes_to_texts))

    @property
    def relates_prototypes_to_texts(self) -> bool:
        """Whether this relation can change: prototypes are shared, so frozen texts would relate to them as the teachers' do."""
        return self.prototype_text_relation and self.text_tower == "trained"

    @property
    def needs_prototypes(self) -> bool:
        """Whether any term reads the prototypes."""
        related = self.image_prototype_relation or self.relates_prototypes_to_texts
        return self.alignment_weight > 0 or (self.relation_weight > 0 and related)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "text_tower", ("trained", "frozen"))
        check_field(self, "prototype_update", ("ema", "learnable", "fixed"))
        check_field(self, "feature_distance", ("squared", "norm"))
        check_field(self, "teacher_view", ("batch", "evaluation"))
        check_field(self, "teacher_weighting", WEIGHTINGS)
        check_fraction(self, "prototype_momentum", "inter_task_share")
        check_at_least(self, 0, "alignment_weight", "feature_weight", "relation_weight", "relation_columns")
        check_at_least(self, 0, "threshold", "sharpness")
        for name in ("temperature", "weighting_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if self.relation_weight > 0 and not self.relates:
            raise ValueError(
                f"relation_weight: {self.relation_weight} of no relation; switch one on (prototype_text_relation needs a "
                "text tower that trains), or set relation_weight to 0"
            )
        if self.average_every < 0:
            raise ValueError(f"average_every: expected a number of steps >= 1, or 0 for none, got {self.average_every}")

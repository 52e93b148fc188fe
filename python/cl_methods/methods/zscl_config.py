"""Settings of ZSCL and of the published methods that are switches of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

from cl_methods.checks import check_at_least, check_field, check_fraction
from cl_methods.datasets.task import Reference
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.settings import scenario_settings


@dataclass(frozen=True)
class ZSCLConfig(TrainConfig):
    """Every switch of ZSCL that a table of the paper varies; the defaults are the published method.

    Attributes:
        reference_batch_size: reference images per step.
        image_loss, text_loss: distil along the texts of each image, and along the images of each text.
        distillation_weight: factor of both and of ``relation_loss`` (0.5 is the code's ``weight_adjust``).
        text_tower_loss: also distil the student's *text* features of sampled reference texts against the teacher's image
            features. The published terms send no gradient to the text tower, which only cross-entropy and consolidation then
            hold; that is enough at the published learning rates, and not where steps are far larger.
        text_batch_size: reference texts per step for ``text_tower_loss``.
        temperature: of the distillation.
        feature_mse: add the mean squared difference of normalised reference image features.
        relation_loss: distil image-image similarities (``ablation_loss_2``).
        teacher: ``zero_shot``; ``previous``, the model before this task (LwF); ``mixed``, between the two (``ref-wise``).
        teacher_mix: share of the previous model in the mixed teacher.
        reference_texts: ``captions`` of the reference set, ``random`` tokens (LwF-VR), or the task's ``classes`` (LwF).
        reference_images: of the ``reference`` set, or of the ``task`` itself (LwF).
        consolidation: λ of ``λ Σ||θ − θ_start||²`` (``l2``).
        ensemble: what is kept after the task: the last weights (``none``), the ``mean`` of start and snapshots (``we``), or
            the mean pulled to the start at each snapshot (``wise``, ``we_wise``).
        ensemble_wise_alpha: share of the mean at each such pull.
        average_every: steps between snapshots and moving averages.
        moving_average: pull the trained weights towards the ``start`` of the task, those before the ``previous`` pull, or the
            ``zero_shot`` model.
        moving_average_decay: share of the trained weights at each pull.
        wise_merge: after the task, interpolate with the ``start`` or the ``zero_shot`` model (WiSE-FT).
        wise_merge_alpha: share of the trained weights.
    """

    reference_batch_size: int = 64
    image_loss: bool = True
    text_loss: bool = True
    distillation_weight: float = 1.0
    text_tower_loss: bool = False
    text_batch_size: int = 64
    temperature: float = 2.0
    feature_mse: bool = False
    relation_loss: bool = False
    teacher: Literal["zero_shot", "previous", "mixed"] = "zero_shot"
    teacher_mix: float = 0.8
    reference_texts: Literal["captions", "random", "classes"] = "captions"
    reference_images: Literal["reference", "task"] = "reference"
    consolidation: float = 1.0
    ensemble: Literal["none", "mean", "wise"] = "mean"
    ensemble_wise_alpha: float = 0.98
    average_every: int = 100
    moving_average: Literal["none", "start", "previous", "zero_shot"] = "none"
    moving_average_decay: float = 0.999
    wise_merge: Literal["none", "start", "zero_shot"] = "none"
    wise_merge_alpha: float = 0.8

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "zscl": {},
        "zscl_star": {"consolidation": 0.0},
        "lwf": {
            "teacher": "previous",
            "reference_texts": "classes",
            "reference_images": "task",
            "text_tower_loss": False,
            "consolidation": 0.0,
            "ensemble": "none",
        },
        "lwf_vr": {
            "teacher": "previous",
            "reference_texts": "random",
            "reference_images": "task",
            "text_tower_loss": False,
            "consolidation": 0.0,
            "ensemble": "none",
        },
        "wc": {"image_loss": False, "text_loss": False, "text_tower_loss": False, "ensemble": "none"},
        "we": {"image_loss": False, "text_loss": False, "text_tower_loss": False, "consolidation": 0.0},
        "wise_ft": {
            "image_loss": False,
            "text_loss": False,
            "text_tower_loss": False,
            "consolidation": 0.0,
            "ensemble": "none",
            "wise_merge": "start",
        },
    }

    @classmethod
    def preset(cls, name: str, scenario: str = "mtil", **changes: Any) -> Self:
        """A published relative of ZSCL by name: zscl, zscl_star, lwf, lwf_vr, wc, we, wise_ft.

        Args:
            name: one of ``presets``.
            scenario: whose optimisation settings to use.
            changes: fields to override.

        Raises:
            ValueError: no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f"name: expected one of {', '.join(cls.presets)}, got {name!r}")
        return cls(**{**scenario_settings("zscl", scenario), **cls.presets[name], **changes})

    @classmethod
    def relative(cls, name: str, config: TrainConfig, **changes: Any) -> Self:
        """The preset ``name`` with the optimisation settings, and all else that goes by the same name, of another ``config``.

        Args:
            name: one of ``presets``.
            config: settings of a method that is a switch of ZSCL.
            changes: fields to override.

        Raises:
            ValueError: no such preset, or a setting is wrong.
        """
        known = {entry.name for entry in fields(cls)}
        shared = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name in known}
        return cls.preset(name, **{**shared, **changes})

    @property
    def distils(self) -> bool:
        """Whether any term needs the teacher."""
        return self.image_loss or self.text_loss or self.text_tower_loss or self.feature_mse or self.relation_loss

    @property
    def needs_start(self) -> bool:
        """Whether the weights at the start of a task are needed while it is learnt."""
        teaches = self.distils and self.teacher != "zero_shot"
        averaged = self.ensemble == "wise" or "start" in (self.moving_average, self.wise_merge)
        return teaches or averaged or self.consolidation > 0

    @property
    def zero_shot_teaches(self) -> bool:
        """Whether the model from before the first task is the teacher of the whole run."""
        return self.distils and self.teacher == "zero_shot"

    @property
    def needs_zero_shot(self) -> bool:
        """Whether the weights from before the first task are needed."""
        teaches = self.distils and self.teacher != "previous"
        return teaches or "zero_shot" in (self.moving_average, self.wise_merge)

    def check_reference(self, reference: Reference | None) -> None:
        """Refuse to distil on what is not there.

        Raises:
            ValueError: the scenario's ``reference`` lacks images or captions that these settings ask for.
        """
        if not self.distils:
            return
        if self.reference_images == "reference" and (reference is None or not reference.has_images):
            raise ValueError(
                "reference_images: this scenario has no reference set to distil on (scenario folders takes it from the "
                "folder _reference in data.root); "
                "set reference_images='task' and reference_texts='classes' to distil on each task's own data (LwF)"
            )
        if self.reference_texts == "captions" and (
            reference is None or not (reference.captions or reference.random_texts)
        ):
            raise ValueError(
                "reference_texts: this scenario has no captions; expected 'random' or 'classes' instead of 'captions'"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "teacher", ("zero_shot", "previous", "mixed"))
        check_field(self, "reference_texts", ("captions", "random", "classes"))
        check_field(self, "reference_images", ("reference", "task"))
        check_field(self, "ensemble", ("none", "mean", "wise"))
        check_field(self, "moving_average", ("none", "start", "previous", "zero_shot"))
        check_field(self, "wise_merge", ("none", "start", "zero_shot"))
        if self.text_batch_size < 1:
            raise ValueError(f"text_batch_size: expected a number of texts >= 1, got {self.text_batch_size}")
        check_fraction(self, "teacher_mix", "ensemble_wise_alpha", "moving_average_decay", "wise_merge_alpha")
        for name in ("reference_batch_size", "average_every", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        check_at_least(self, 0, "consolidation", "distillation_weight")
        if self.wise_merge != "none" and self.ensemble != "none":
            raise ValueError("wise_merge: the ensemble replaces the merged weights; set ensemble to 'none'")

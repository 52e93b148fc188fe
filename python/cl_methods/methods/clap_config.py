"""Settings of CLAP4CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cl_methods.checks import check_at_least, check_field
from cl_methods.methods.config import TrainConfig

Prior = Literal["standard_normal", "data_driven", "language_aware"]
ExemplarSelection = Literal["random", "herding", "confidence", "energy", "entropy", "variance"]


@dataclass(frozen=True)
class ClapConfig(TrainConfig):
    """Settings of :class:`~cl_methods.methods.clap4clip.CLAP4CLIP`; the published ones of the class-incremental runs.

    Attributes:
        optimizer: ``sgd`` with ``momentum``, or ``adamw`` with ``betas``.
        momentum: of SGD.
        visual_attention: whether class texts look at image features.
        attention_hidden: width of the attention layer's feed-forward part.
        attention_dropout: in that layer, while it trains.
        scope: what the attention looks at when an image is scored: its whole ``batch`` of evaluation images, as published, or
            that image alone (``sample``).
        samples: F, draws of every class text per step.
        evaluation_samples: draws per class text when images are scored; 0: the mean over all possible draws, exactly.
        one_scale: bring scores of learnt classes to the scale of zero-shot ones, so that both can compete. It changes nothing
            among classes of learnt tasks, and costs the scores of all learnt tasks for each; their energy is then CLIP's.
        hierarchical: a posterior shared by all tasks before those of the tasks.
        global_samples: draws of the shared posterior per step.
        initialisation: of each task's adapter: ``language_aware``, from class texts and their variance over templates, or
            ``random``, as any linear map.
        prior: of each task's posterior; see :mod:`cl_methods.methods.variational_adapters`.
        prior_context: share of the batch from which the data-driven prior is made.
        kl_weight: of the divergence from the prior; 0 leaves it out.
        past_task_weight: β, of the regulariser that keeps draws next to the texts of their classes; 0 leaves it out.
        memory: images of all tasks together, the same number for every class.
        memory_per_class: at most so many images of a class, from the first task on; None for no such bound.
        selection: which images of a class are kept: ``random`` ones, those that ``herding`` takes, or by an uncertainty of
            :func:`~cl_methods.components.uncertainty.uncertainty`.
        keep: with an uncertainty, whether the most ``uncertain`` images of a class are kept or the most ``certain``.
        fine_tuning_iterations: T of the second stage, on the balanced memory; 0 leaves the stage out.
        fine_tuning_lr_factor: its peak learning rate over that of the task.
    """

    lr: float = 1.6e-3
    batch_size: int = 32
    warmup: int = 240
    iterations: int = 800
    label_smoothing: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    visual_attention: bool = True
    attention_hidden: int = 2048
    attention_dropout: float = 0.1
    scope: Literal["sample", "batch"] = "sample"
    samples: int = 20
    evaluation_samples: int = 0
    one_scale: bool = False
    hierarchical: bool = False
    global_samples: int = 10
    initialisation: Literal["language_aware", "random"] = "language_aware"
    prior: Prior = "standard_normal"
    prior_context: float = 0.67
    kl_weight: float = 1e-3
    past_task_weight: float = 15.0
    memory: int = 2000
    memory_per_class: int | None = None
    selection: ExemplarSelection = "random"
    keep: Literal["uncertain", "certain"] = "uncertain"
    fine_tuning_iterations: int = 125
    fine_tuning_lr_factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "optimizer", ("sgd", "adamw"))
        check_field(self, "scope", ("sample", "batch"))
        check_field(self, "initialisation", ("language_aware", "random"))
        check_field(self, "prior", get_args(Prior))
        check_field(self, "selection", get_args(ExemplarSelection))
        check_field(self, "keep", ("uncertain", "certain"))
        for name in ("samples", "global_samples", "attention_hidden", "memory", "memory_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        check_at_least(self, 0, "evaluation_samples", "kl_weight", "past_task_weight", "fine_tuning_iterations")
        for name in ("attention_dropout", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {getattr(self, name)}")
        if not 0 < self.prior_context <= 1:
            raise ValueError(f"prior_context: expected 0 < value <= 1, got {self.prior_context}")
        if not self.fine_tuning_lr_factor > 0:
            raise ValueError(f"fine_tuning_lr_factor: expected a number > 0, got {self.fine_tuning_lr_factor}")
        if self.prior == "data_driven" and not self.visual_attention:
            raise ValueError("prior: 'data_driven' is made by the visual attention; set visual_attention to true")
        if self.prior != "standard_normal" and not self.kl_weight:
            raise ValueError(
                f"prior: {self.prior!r} has no effect without the divergence from it; set kl_weight above 0"
            )
        if self.keep != "uncertain" and self.selection in ("random", "herding"):
            raise ValueError(f"keep: {self.keep!r} asks for an uncertainty, and selection is {self.selection!r}")
        if self.selection == "variance" and self.samples < 2:
            raise ValueError(f"selection: the variance of draws needs samples >= 2, got {self.samples}")

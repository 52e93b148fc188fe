"""Weight ensemble: fine-tune, and keep the mean of the weights that training passed through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cl_methods.backbone import Backbone
from cl_methods.checks import check_field
from cl_methods.datasets.task import Reference
from cl_methods.methods.base import Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.zscl import ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig


@dataclass(frozen=True)
class WeightEnsembleConfig(TrainConfig):
    """Settings of :class:`TrainConfig`, and of the mean.

    Attributes:
        average_every: steps between snapshots; the first is taken after the first step.
        ensemble: the ``mean`` of start and snapshots; or ``wise``, the same pulled to the start at every snapshot.
        ensemble_wise_alpha: share of the mean at each such pull.
    """

    average_every: int = 100
    ensemble: Literal["mean", "wise"] = "mean"
    ensemble_wise_alpha: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "ensemble", ("mean", "wise"))
        self.as_zscl()

    def as_zscl(self) -> ZSCLConfig:
        """The same as switches of ZSCL.

        Raises:
            ValueError: a setting is wrong.
        """
        return ZSCLConfig.relative("we", self)


class WeightEnsemble(ZSCL):
    """``θ̂ ← (n θ̂ + θ) / (n + 1)`` every few steps of plain fine-tuning, from ``θ̂ = θ_start``; θ̂ is kept after the task.

    The mean is evaluated and carried to the next task. Between tasks nothing but the model is stored; during one, the mean
    beside the weights that train. It is the averaging of ZSCL without its losses.

    Source: the weight-ensemble baseline of ZSCL (Zheng et al., ICCV 2023), after Izmailov et al., "Averaging weights leads to
    wider optima and better generalization", UAI 2018.
    """

    name: ClassVar[str] = "weight_ensemble"
    facts: ClassVar[Facts] = Facts(
        source="baseline of Zheng et al., ICCV 2023",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = WeightEnsembleConfig

    def __init__(self, backbone: Backbone, config: WeightEnsembleConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config.as_zscl(), reference)

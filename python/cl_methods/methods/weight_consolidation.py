"""Weight consolidation: fine-tune with every weight held to where the task found it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Reference
from cl_methods.methods.base import Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.zscl import ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig


@dataclass(frozen=True)
class WeightConsolidationConfig(TrainConfig):
    """Settings of :class:`TrainConfig`, and how strongly the weights are held.

    Attributes:
        consolidation: λ of ``λ Σ||θ − θ_start||²``; 0 is fine-tuning.
    """

    consolidation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_zscl()

    def as_zscl(self) -> ZSCLConfig:
        """The same as switches of ZSCL.

        Raises:
            ValueError: a setting is wrong.
        """
        return ZSCLConfig.relative("wc", self)


class WeightConsolidation(ZSCL):
    """``L = L_CE + λ Σ||θ − θ_start||²`` with every weight as stiff as any other, θ_start the model before the task.

    EWC without the Fisher information. The gradient of the second term is added in closed form. Between tasks nothing but
    the model is stored; during one, a copy of it from its start.

    Source: the weight-consolidation baseline of ZSCL (Zheng et al., ICCV 2023); Kirkpatrick et al., PNAS 2017, compare EWC with
    such a uniform penalty.
    """

    name: ClassVar[str] = "weight_consolidation"
    facts: ClassVar[Facts] = Facts(
        source="baseline of Zheng et al., ICCV 2023",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = WeightConsolidationConfig

    def __init__(
        self, backbone: Backbone, config: WeightConsolidationConfig, reference: Reference | None = None
    ) -> None:
        super().__init__(backbone, config.as_zscl(), reference)

"""WiSE-FT: fine-tune, then interpolate with the weights from before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Reference
from cl_methods.methods.base import Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.zscl import ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig


@dataclass(frozen=True)
class WiSEFTConfig(TrainConfig):
    """Settings of :class:`TrainConfig`, and how far the way back is.

    Attributes:
        alpha: share of the fine-tuned weights in the result.
        towards: the other end: the ``zero_shot`` model, or the weights at the ``start`` of the task, which is what the
            published MTIL numbers were made with (at alpha 0.8).
    """

    alpha: float = 0.5
    towards: Literal["zero_shot", "start"] = "zero_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected 0 <= value <= 1, got {self.alpha}")
        if self.towards not in ("zero_shot", "start"):
            raise ValueError(f"towards: expected zero_shot or start, got {self.towards!r}")


class WiSEFT(ZSCL):
    """``θ ← α θ_fine-tuned + (1 − α) θ_before`` after every task; training itself is plain fine-tuning.

    The interpolated weights are evaluated and carried to the next task. Between tasks nothing else is stored.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, equation 1, where θ_before is the zero-shot
    model; as a baseline of ZSCL (Zheng et al., ICCV 2023) it is the model that the task started from.
    """

    name: ClassVar[str] = "wise_ft"
    facts: ClassVar[Facts] = Facts(
        source="Wortsman et al., CVPR 2022",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = WiSEFTConfig

    def __init__(self, backbone: Backbone, config: WiSEFTConfig, reference: Reference | None = None) -> None:
        merge = {"wise_merge": config.towards, "wise_merge_alpha": config.alpha}
        super().__init__(backbone, ZSCLConfig.relative("wise_ft", config, **merge), reference)

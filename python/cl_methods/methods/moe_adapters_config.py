"""Settings of MoE-Adapters: experts, routers, and who chooses among them at test time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cl_methods.checks import check_field
from cl_methods.components.ddas import DDASConfig
from cl_methods.components.density_selector import DensityConfig
from cl_methods.methods.config import TrainConfig


@dataclass(frozen=True)
class MoEAdaptersConfig(TrainConfig):
    """Settings of :class:`~cl_methods.methods.moe_adapters.MoEAdapters`; the defaults are those of the full-shot MTIL run.

    Attributes:
        experts: E per block.
        top_k: experts per sample.
        bottleneck: width of an expert.
        scale: factor of the adapter branch.
        dropout: after the ReLU of an expert, in training.
        gating_noise: noisy gates in training.
        text_adapters: adapters in the text tower too.
        routers: one per task (``task``), or one for all (``shared``, class-incremental form).
        freeze: most used experts per block that stop training after each task; 0 for none.
        detection: who chooses the router of a test image: ``ddas``, ``density``, or ``none`` for the one shared router.
        ddas: settings of the autoencoders (:class:`~cl_methods.components.ddas.DDAS`).
        density: settings of the densities (:class:`~cl_methods.components.density_selector.DensitySelector`).
    """

    lr: float = 1e-3
    experts: int = 22
    top_k: int = 2
    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    gating_noise: bool = True
    text_adapters: bool = True
    routers: Literal["task", "shared"] = "task"
    freeze: int = 2
    detection: Literal["ddas", "density", "none"] = "ddas"
    ddas: DDASConfig = field(default_factory=DDASConfig)
    density: DensityConfig = field(default_factory=DensityConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "routers", ("task", "shared"))
        check_field(self, "detection", ("ddas", "density", "none"))
        for name in ("experts", "bottleneck", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: expected 1 to experts = {self.experts}, got {self.top_k}")
        if not 0 <= self.freeze <= self.experts:
            raise ValueError(f"freeze: expected 0 to experts = {self.experts}, got {self.freeze}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= value < 1, got {self.dropout}")
        if self.routers == "task" and self.detection == "none":
            raise ValueError("detection: 'none' leaves open which task's router to use; set routers to 'shared'")
        if self.routers == "shared" and self.detection != "none":
            raise ValueError("detection: a shared router needs no detector; set detection to 'none'")

"""What a run can do to train with less memory besides cutting batches into parts; each is off unless it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cl_methods.backbone import Precision
from cl_methods.methods.base import Method
from cl_methods.training.memory.optimizer_state import OptimizerState

Offload = Literal["none", "averages", "anchors", "all"]


@dataclass(frozen=True)
class Levers:
    """Choices that save memory.

    Attributes:
        precision: ``bf16``: towers that train compute under autocast, from fp32 weights to fp32 features and gradients.
        optimizer_state: ``8bit``: AdamW's moments in 8 bits; ``host``: the optimiser's state, and its steps, on the host.
        offload: which weights lie in host memory: ``averages`` of those that train, ``anchors`` that they are compared or mixed
            with, or ``all`` of both.
    """

    precision: Precision = "fp32"
    optimizer_state: OptimizerState = "fp32"
    offload: Offload = "none"

    @property
    def averages_on_host(self) -> bool:
        """Whether averages of weights lie there."""
        return self.offload in ("averages", "all")

    @property
    def anchors_on_host(self) -> bool:
        """Whether anchors do."""
        return self.offload in ("anchors", "all")

    @property
    def options(self) -> list[str]:
        """Those that are used, as on the command line."""
        return [
            f"--{entry.name.replace('_', '-')} {getattr(self, entry.name)}"
            for entry in dataclasses.fields(self)
            if getattr(self, entry.name) != entry.default
        ]

    def beyond(self, others: Levers) -> list[str]:
        """Those of :attr:`options` that ``others`` do not use."""
        return [option for option in self.options if option not in others.options]

    def with_all(self, others: Iterable[Levers]) -> Levers:
        """These and what each of ``others`` adds to them, the first where several set the same and cannot be had together."""
        found = self
        for other in others:
            for entry in dataclasses.fields(self):
                if getattr(found, entry.name) == entry.default:
                    found = dataclasses.replace(found, **{entry.name: getattr(other, entry.name)})
            found = dataclasses.replace(found, offload=_both(found.offload, other.offload))
        return found

    def others(self, *, host_apart: bool, adamw: bool) -> Iterator[Levers]:
        """These levers and one more, from the one that changes least of what is computed to the one that changes most.

        Args:
            host_apart: whether the host's memory is not the one that is planned.
            adamw: whether the optimiser is AdamW.
        """
        offers: list[dict[str, Any]] = []
        if host_apart:
            offers += [{"offload": kind} for kind in ("averages", "anchors") if self.offload not in (kind, "all")]
            offers.append({"optimizer_state": "host"})
        offers.append({"precision": "bf16"})
        if adamw:
            offers.append({"optimizer_state": "8bit"})
        for offer in offers:
            (name,) = offer
            if name == "offload":
                yield dataclasses.replace(self, offload=_both(self.offload, offer[name]))
            elif getattr(self, name) == getattr(Levers, name):
                yield dataclasses.replace(self, **offer)


def _both(one: Offload, other: Offload) -> Offload:
    """What lies on the host where both are asked for."""
    return one if other in (one, "none") else other if one == "none" else "all"


def use_levers(method: Method, levers: Levers) -> None:
    """Let a method that has not begun a task train with ``levers``; its optimiser's state is the caller's."""
    method.backbone.precision = levers.precision
    host_apart = method.backbone.device.type != "cpu"
    method.offload_averages = levers.averages_on_host and host_apart
    method.offload_anchors = levers.anchors_on_host and host_apart

"""What a run can do to train with less memory besides cutting batches into parts; each is off unless it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cl_methods.backbone import Precision
from cl_methods.methods.base import Method
from cl_methods.training.memory.optimizer_state import OptimizerState

Offload = Literal["none", "averages"]


@dataclass(frozen=True)
class Levers:
    """Choices that save memory.

    Attributes:
        precision: ``bf16``: towers that train compute under autocast, from fp32 weights to fp32 features and gradients.
        optimizer_state: ``8bit``: AdamW's moments in 8 bits; ``host``: the optimiser's state, and its steps, on the host.
        offload: ``averages``: averages of weights lie in host memory.
    """

    precision: Precision = "fp32"
    optimizer_state: OptimizerState = "fp32"
    offload: Offload = "none"

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
        """These and what each of ``others`` adds to them, the first where several set the same."""
        found = self
        for other in others:
            for entry in dataclasses.fields(self):
                if getattr(found, entry.name) == entry.default:
                    found = dataclasses.replace(found, **{entry.name: getattr(other, entry.name)})
        return found

    def others(self, *, host_apart: bool, adamw: bool) -> Iterator[Levers]:
        """These levers and one more, from the one that changes least of what is computed to the one that changes most.

        Args:
            host_apart: whether the host's memory is not the one that is planned.
            adamw: whether the optimiser is AdamW.
        """
        offers: list[dict[str, Any]] = []
        if host_apart:
            offers += [{"offload": "averages"}, {"optimizer_state": "host"}]
        offers.append({"precision": "bf16"})
        if adamw:
            offers.append({"optimizer_state": "8bit"})
        for offer in offers:
            (name,) = offer
            if getattr(self, name) == getattr(Levers, name):
                yield dataclasses.replace(self, **offer)


def use_levers(method: Method, levers: Levers) -> None:
    """Let a method that has not begun a task train with ``levers``; its optimiser's state is the caller's."""
    method.backbone.precision = levers.precision
    method.offload_averages = levers.offload == "averages" and method.backbone.device.type != "cpu"

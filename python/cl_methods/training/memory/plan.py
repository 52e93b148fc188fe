"""What a memory plan says: which parts a batch is cut into, and the bytes that it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.training.memory.levers import Levers
from cl_methods.training.sizes import format_size

RESERVE = 0.08
"""Share of a budget that stays free: allocators lose some memory between tensors, and libraries take some that nobody counts."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is cut into parts, and the bytes that it comes to.

    Attributes:
        budget: bytes; None if there was none, and the plan only predicts.
        micro_batches: samples per part; None: everything at once.
        process: bytes that the process holds besides tensors (libraries, code); 0 on a GPU.
        model: weights and buffers of the model.
        carried: what the method holds besides: teachers, anchors, averages, adapters, cached features.
        optimiser: its state.
        gradients: of what trains.
        step: inputs, activations and buffers of a training step, at the moment when they are most; on a GPU the next step's inputs
            with them.
        left_out: what could not be predicted; None if nothing.
        levers: what else saves memory in this plan.
        processes: how many share the encoding of a batch; the bytes are those of the one with most of it.
        sharded: whether each of them holds its rows alone of weights, gradients and optimiser state.
        outside: the most bytes of tensors before and after a task's steps, where sharded weights are whole: loaded, copied for a
            teacher, evaluated; 0 where they are not sharded.
        exchanged, exchanges: bytes of the sharded weights and gradients that a step gathers or reduces, and in how many pieces.
    """

    budget: int | None
    micro_batches: MicroBatches | None
    process: int
    model: int
    carried: int
    optimiser: int
    gradients: int
    step: int
    left_out: str | None
    levers: Levers = field(default_factory=Levers)
    processes: int = 1
    sharded: bool = False
    outside: int = 0
    exchanged: int = 0
    exchanges: int = 0

    @property
    def peak(self) -> int:
        """The most bytes at any time of a training step, and with sharded weights of what is around the steps."""
        step = self.model + self.carried + self.optimiser + self.gradients + self.step
        return self.process + max(step, self.outside)

    def fits(self, budget: int) -> bool:
        """Whether it leaves the reserve of a budget of so many bytes free."""
        return self.peak <= (1 - RESERVE) * budget

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "peak": self.peak}

    @property
    def shares(self) -> str:
        """What the peak is made of, in words."""
        named = {
            "process": self.process,
            "model": self.model,
            "carried by the method": self.carried,
            "optimiser": self.optimiser,
            "gradients": self.gradients,
            "inputs, activations and buffers": self.step,
        }
        return ", ".join(f"{name} {format_size(value)}" for name, value in named.items() if value)

    def measured(self, peaks: Sequence[int]) -> str:
        """How the prediction did against the measured peak of every process, in a sentence."""
        apart = 100 * (max(peaks) / self.peak - 1)
        each = ", ".join(format_size(peak) for peak in peaks)
        where = f" of {len(peaks)} processes" if len(peaks) > 1 else ""
        return f"measured peak memory{where} {each}, predicted for a training step {format_size(self.peak)} ({apart:+.1f} %)"

    def lines(self) -> list[str]:
        """The plan in words, a line for each fact."""
        budget = "" if self.budget is None else f" of a budget of {format_size(self.budget)}"
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        if self.sharded:
            each += ", weights sharded"
        lines = [f"predicted peak memory of a training step{each}: {format_size(self.peak)}{budget}", self.shares]
        if self.levers.options:
            lines.append(f"with {', '.join(self.levers.options)}")
        cut = self.micro_batches
        if cut is None:
            lines.append("every batch goes through the towers at once")
        else:
            again = "block by block" if cut.blocks else "once more"
            lines.append(
                f"{cut.images} images and {cut.texts} texts at a time, whose activations are computed {again} in the backward "
                f"pass; {cut.frozen_images} and {cut.frozen_texts} where no gradient is needed"
            )
        if self.process + self.outside == self.peak:
            lines.append(
                f"of these {format_size(self.outside)} between the steps, while weights are whole: loaded, copied for a "
                "teacher, or evaluated"
            )
        if self.left_out is not None:
            lines.append(f"not counted: {self.left_out}")
        return lines

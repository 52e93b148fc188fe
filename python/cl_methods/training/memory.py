"""The memory plan: how many samples go through a tower together so that a training step stays within a budget."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cl_kernels.profile import resident_bytes
from cl_methods.backbone import Backbone, load_backbone
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Method
from cl_methods.methods.find import find_method
from cl_methods.micro_batches import MicroBatches
from cl_methods.open_clip_loading import shapes_of_open_clip
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.memory_trace import Rehearsal
from cl_methods.training.sizes import format_size

_SIZES = (64, 32, 16, 8, 4, 2, 1)
"""Images per part that are tried, one after the other."""

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""

_RESERVE = 0.08
"""Share of the budget that stays free: allocators lose some memory between tensors, and libraries take some that nobody counts."""

_BLOCKWISE = 4
"""Images per part, at most, where blocks are computed again one by one: larger parts would gain nothing over smaller ones."""

_TEXTS_PER_IMAGE = 4
"""A text of a dozen tokens needs less than a quarter of what an image of some 200 patches does."""

_WITHOUT_GRADIENT = 4
"""Times as many samples without a gradient need less memory than with one: nothing is kept for a backward pass."""


class MemoryBudgetError(ValueError):
    """No plan fits the budget."""


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
        step: inputs, activations and buffers of a training step, at the moment when they are most.
        left_out: what could not be predicted; None if nothing.
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

    @property
    def peak(self) -> int:
        """The most bytes at any time of a training step."""
        return self.process + self.model + self.carried + self.optimiser + self.gradients + self.step

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

    def measured(self, peak: int) -> str:
        """How the prediction did against a measured ``peak``, in a sentence."""
        apart = 100 * (peak / self.peak - 1)
        return f"measured peak memory {format_size(peak)}, predicted for a training step {format_size(self.peak)} ({apart:+.1f} %)"

    def lines(self) -> list[str]:
        """The plan in words, a line for each fact."""
        budget = "" if self.budget is None else f" of a budget of {format_size(self.budget)}"
        lines = [f"predicted peak memory of a training step: {format_size(self.peak)}{budget}", self.shares]
        cut = self.micro_batches
        if cut is None:
            lines.append("every batch goes through the towers at once")
        else:
            again = "block by block" if cut.blocks else "once more"
            lines.append(
                f"{cut.images} images and {cut.texts} texts at a time, whose activations are computed {again} in the backward "
                f"pass; {cut.frozen_images} and {cut.frozen_texts} where no gradient is needed"
            )
        if self.left_out is not None:
            lines.append(f"not counted: {self.left_out}")
        return lines


def plan_memory(
    method: type[Method],
    settings: Any,
    backbone: Backbone,
    tasks: Sequence[Task],
    reference: Reference | None,
    budget: int | None,
) -> MemoryPlan:
    """The fastest way to train within ``budget``: all at once, else in the largest parts that fit, else block by block.

    Every way is rehearsed on tensors without data (:class:`~cl_methods.training.memory_trace.Rehearsal`), so the figures are those
    of the method's own code with its settings.

    Args:
        method: its class; it takes optimiser steps.
        settings: its configuration.
        backbone: gives the shapes; its weights may be on the meta device.
        tasks: the sequence.
        reference: reference data, or None.
        budget: bytes; None: predict the peak of everything at once.

    Raises:
        MemoryBudgetError: nothing fits with a reserve of 8 %; the message says what would.
    """
    first = _parts(_SIZES[0])
    rehearsal = Rehearsal(method, settings, backbone, tasks, reference, None if budget is None else first)
    process = _process_bytes(backbone)
    fixed = rehearsal.model + rehearsal.carried + rehearsal.optimiser + rehearsal.gradients

    def planned(parts: MicroBatches | None) -> MemoryPlan:
        peak = rehearsal.step(parts)
        return MemoryPlan(
            budget,
            parts,
            process,
            rehearsal.model,
            rehearsal.carried,
            rehearsal.optimiser,
            rehearsal.gradients,
            max(0, peak - fixed),
            rehearsal.left_out,
        )

    whole = planned(None)
    if budget is None or whole.peak <= (1 - _RESERVE) * budget:
        return whole
    smallest = whole
    for parts in _ways(rehearsal.largest_batch):
        plan = planned(parts)
        if plan.peak <= (1 - _RESERVE) * budget:
            return plan
        smallest = min(smallest, plan, key=lambda one: one.peak)
    needed = format_size(smallest.peak / (1 - _RESERVE) + 1, up=True)
    raise MemoryBudgetError(
        f"memory_budget: {method.name} on {backbone.name} does not fit into {format_size(budget)}: it needs "
        f"{format_size(smallest.peak)} even with one image at a time ({smallest.shares}), and a reserve of {_RESERVE:.0%}; "
        f"expected a budget of at least {needed}"
    )


def plan_run(config: RunConfig, scenario: Scenario, device: torch.device) -> MemoryPlan | None:
    """:func:`plan_memory` of a configured run; None for a method that takes no optimiser steps.

    Raises:
        MemoryBudgetError: nothing fits.
        ValueError: the model is unknown or has to be loaded and cannot be.
    """
    method = find_method(config.method)
    if not method.trains or method.closed_form:
        return None
    backbone = _shapes(config, device)
    return plan_memory(
        method, config.effective_settings(), backbone, scenario.tasks, scenario.reference, config.memory_bytes
    )


def _shapes(config: RunConfig, device: torch.device) -> Backbone:
    """The model that will be trained, without its weights where they need not be read to know its shapes."""
    if config.model == "mini" or config.model.startswith("local-dir:"):
        backbone = load_backbone(config.model, config.pretrained)
    else:
        network, *rest = shapes_of_open_clip(config.model)
        backbone = Backbone(network, *rest, name=config.model, device="meta")
    backbone.device = device
    return backbone


def give_back_freed_memory() -> None:
    """From now on, let the C library return every freed block of a megabyte to the system at once, where it is glibc.

    Otherwise it raises that bound to 32 MiB by itself, and activations of many sizes leave gaps: ZSCL on ViT-B/16 held a seventh
    more than its tensors. New memory costs page faults, which a run without a budget is spared.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


def _ways(largest: int) -> Iterator[MicroBatches]:
    """From the fastest to the smallest, for batches of so many images."""
    yield from (_parts(size) for size in _SIZES if size < max(2, largest))
    yield from (_parts(size, blocks=True) for size in _SIZES if size <= _BLOCKWISE)


def _parts(images: int, *, blocks: bool = False) -> MicroBatches:
    texts, frozen = _TEXTS_PER_IMAGE * images, _WITHOUT_GRADIENT * images
    return MicroBatches(images, texts, frozen, _TEXTS_PER_IMAGE * frozen, blocks=blocks, keep_last=not blocks)


def _process_bytes(backbone: Backbone) -> int:
    """What is resident without the model's weights, on a CPU; on a GPU only tensors are counted."""
    if backbone.device.type == "cuda":
        return 0
    _warm_up()
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    weights = sum(value.numel() * value.element_size() for value in tensors if not value.is_meta)
    return max(0, resident_bytes() - weights)


def _warm_up() -> None:
    """One small convolution, product and attention with gradients: libraries take buffers for good when they are first used."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        images = torch.zeros(4, 3, 64, 64, requires_grad=True)
        tokens = torch.nn.functional.conv2d(images, torch.zeros(256, 3, 16, 16), stride=16).flatten(2).transpose(1, 2)
        heads = (tokens @ torch.zeros(256, 1024))[..., :256].unflatten(-1, (4, 64)).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).sum().backward()

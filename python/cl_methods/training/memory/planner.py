"""The memory plan: how many samples go through a tower together so that a training step stays within a budget."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from cl_kernels.profile import resident_bytes
from cl_methods import ranks
from cl_methods.backbone import Backbone, Precision, load_backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.backbone.open_clip_loading import shapes_of_open_clip
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Method
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.memory.eight_bit_optimizer import update_bytes
from cl_methods.training.memory.levers import Levers
from cl_methods.training.memory.optimizer_state import (
    OptimizerState,
    check_optimizer,
    load_library,
    state_bytes,
    takes_eight_bits,
)
from cl_methods.training.memory.plan import RESERVE, MemoryPlan
from cl_methods.training.memory.rehearsal import Rehearsal
from cl_methods.training.sizes import format_size

_SIZES = (64, 32, 16, 8, 4, 2, 1)
"""Images per part that are tried, one after the other."""

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""

_BLOCKWISE = 4
"""Images per part, at most, where blocks are computed again one by one: larger parts would gain nothing over smaller ones."""

_TEXTS_PER_IMAGE = 4
"""A text of a dozen tokens needs less than a quarter of what an image of some 200 patches does."""

_WITHOUT_GRADIENT = 4
"""Times as many samples without a gradient need less memory than with one: nothing is kept for a backward pass."""


class MemoryBudgetError(ValueError):
    """No plan fits the budget."""


def plan_memory(
    method: type[Method],
    settings: Any,
    backbone: Backbone,
    tasks: Sequence[Task],
    reference: Reference | None,
    budget: int | None,
    *,
    levers: Levers | None = None,
    processes: int = 1,
    sharded: bool = False,
    on_gpu: bool | None = None,
    evaluated: int = 64,
) -> MemoryPlan:
    """The fastest way to train within ``budget``: all at once, else in the largest parts that fit, else block by block.

    Sharded weights are whole one block at a time, so there only blocks are computed again, in the largest parts that fit.

    Every way is rehearsed on tensors without data (:class:`~cl_methods.training.memory.rehearsal.Rehearsal`), so the figures are
    those of the method's own code with its settings.

    Args:
        method: its class; it takes optimiser steps.
        settings: its configuration.
        backbone: gives the shapes; its weights may be on the meta device.
        tasks: the sequence.
        reference: reference data, or None.
        budget: bytes; None: predict the peak of everything at once.
        levers: what else saves memory; a plan uses what it is given, and proposes the rest where nothing fits. None: nothing.
        processes: how many share the encoding of a batch.
        sharded: whether each of them, of two at least, holds its rows of the weights alone (FSDP2).
        on_gpu: whether tensors lie in a memory of their own; None: as the backbone does.
        evaluated: images of an evaluation that are encoded together; looked at where weights are sharded.

    Raises:
        MemoryBudgetError: nothing fits with a reserve of 8 %; the message says what would.
        ValueError: the method's optimiser cannot keep its state as ``levers`` say, or a package is missing.
    """
    levers = Levers() if levers is None else levers
    load_library(levers.optimizer_state)
    first = None if budget is None else _parts(_SIZES[0])
    host_apart = backbone.device.type != "cpu" if on_gpu is None else on_gpu
    rehearsal = Rehearsal(
        method,
        settings,
        backbone,
        tasks,
        reference,
        first,
        processes,
        sharded=sharded,
        gloo=not host_apart,
        evaluated=evaluated,
    )
    planner = _Planner(rehearsal, backbone, budget, on_gpu)
    check_optimizer(planner.rehearsal.optimizer, levers.optimizer_state)
    whole = planner.plan(None, levers)
    if budget is None or planner.fits(whole):
        return whole
    found = planner.fastest(levers)
    if found is not None:
        return found
    smallest = planner.smallest(levers)
    raise MemoryBudgetError(
        f"memory_budget: {method.name} on {backbone.name} does not fit into {format_size(budget)}: it needs "
        f"{format_size(smallest.peak)} even with one image at a time ({smallest.shares}), and a reserve of {RESERVE:.0%}; "
        f"{planner.proposal(levers)}expected a budget of at least "
        f"{format_size(smallest.peak / (1 - RESERVE) + 1, up=True)}"
    )


class _Planner:
    """Plans of one rehearsal, of which every step is taken once."""

    def __init__(
        self, rehearsal: Rehearsal, backbone: Backbone, budget: int | None, on_gpu: bool | None = None
    ) -> None:
        self.rehearsal, self.budget = rehearsal, budget
        self.host_apart = backbone.device.type != "cpu" if on_gpu is None else on_gpu
        self.process = 0 if on_gpu else _process_bytes(backbone)
        self._steps: dict[tuple[MicroBatches | None, Precision], tuple[int, int, int]] = {}
        self._around: dict[MicroBatches | None, int] = {}

    def plan(self, parts: MicroBatches | None, levers: Levers) -> MemoryPlan:
        """What a step needs with these parts and levers."""
        found, key = self.rehearsal, (parts, levers.precision)
        if key not in self._steps:
            peak, moved = found.step(*key), found.exchanged
            self._steps[key] = peak, sum(size * times for size, times in moved.items()), sum(moved.values())
        peak, exchanged, exchanges = self._steps[key]
        least = self._least(parts, levers)
        held = found.model + found.carried + found.optimiser + found.gradients
        step, outside = max(least.step, peak - held + self._ahead), self._outside(parts)
        return replace(least, step=step, outside=outside, exchanged=exchanged, exchanges=exchanges)

    def _least(self, parts: MicroBatches | None, levers: Levers) -> MemoryPlan:
        """What a step needs with these parts and levers but for activations: known without rehearsing it."""
        found = self.rehearsal
        offloaded = self._offloaded(levers) if self.host_apart else 0
        return MemoryPlan(
            self.budget,
            parts,
            self.process,
            found.model,
            found.carried - offloaded,
            self._state(levers.optimizer_state),
            found.gradients,
            self._update(levers.optimizer_state) + self._ahead,
            found.left_out,
            levers,
            found.processes,
            found.sharded,
        )

    @property
    def _ahead(self) -> int:
        return self.rehearsal.copied_ahead if self.host_apart else 0

    def _offloaded(self, levers: Levers) -> int:
        """What the host holds of what the method carries, less what reading it from there takes."""
        averages = self.rehearsal.averages if levers.averages_on_host else 0
        return averages + (self.rehearsal.anchors - self.rehearsal.staging if levers.anchors_on_host else 0)

    def _outside(self, parts: MicroBatches | None) -> int:
        if parts not in self._around:
            self._around[parts] = self.rehearsal.outside(parts)
        return self._around[parts]

    def fits(self, plan: MemoryPlan) -> bool:
        """Whether it leaves the reserve of the budget free."""
        assert self.budget is not None
        return plan.fits(self.budget)

    def ways(self) -> Iterator[MicroBatches]:
        """Parts from the fastest to the smallest."""
        largest = self.rehearsal.largest_batch
        if self.rehearsal.sharded:
            share = -(-largest // self.rehearsal.processes)
            yield from (_parts(size, blocks=True) for size in _SIZES if size < max(2, 2 * share))
            return
        yield from (_parts(size) for size in _SIZES if size < max(2, largest))
        yield from (_parts(size, blocks=True) for size in _SIZES if size <= _BLOCKWISE)

    def fastest(self, levers: Levers) -> MemoryPlan | None:
        """The first of :meth:`ways` that fits, of those that compute parts again and then of those that compute blocks again.

        Within either kind smaller parts need less, so that few of them have to be rehearsed.
        """
        ways = list(self.ways())
        for kind in (False, True):
            some = [parts for parts in ways if parts.blocks == kind]
            low, high = 0, len(some)
            if not some or not self.fits(self.plan(some[-1], levers)):
                continue
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.fits(self.plan(some[middle], levers)) else (middle + 1, high)
            return self.plan(some[low], levers)
        return None

    def smallest(self, levers: Levers) -> MemoryPlan:
        """The plan that needs least."""
        ways = (None, *(() if self.rehearsal.sharded else (_parts(1),)), _parts(1, blocks=True))
        return min((self.plan(parts, levers) for parts in ways), key=lambda plan: plan.peak)

    def proposal(self, levers: Levers) -> str:
        """Which lever would make it fit, as the middle of a sentence; all of them together if none alone does; else nothing."""
        whole = not self.rehearsal.sharded  # the other levers want whole weights
        adamw = whole and takes_eight_bits(self.rehearsal.optimizer)
        offers = levers.others(host_apart=whole and self.host_apart, adamw=adamw)
        moved = self._offloaded(levers)  # slots may need more than anchors
        others = [one for one in offers if one.offload == levers.offload or self._offloaded(one) > moved]
        for tried in (others, [levers.with_all(others)] if len(others) > 1 else []):
            some = [one for one in tried if self.fits(self._least(None, one))]  # no others have to be rehearsed
            plans = [plan for plan in map(self.smallest, some) if self.fits(plan)]
            if plans:
                named = (f"{' '.join(plan.levers.beyond(levers))} ({format_size(plan.peak)})" for plan in plans)
                return f"it would fit with {', or with '.join(named)}; "
        return ""

    def _state(self, kind: OptimizerState) -> int:
        if kind == "8bit":
            return state_bytes((value.numel() for value in self.rehearsal.optimizer.state), kind)
        return 0 if kind == "host" and self.host_apart else self.rehearsal.optimiser

    def _update(self, kind: OptimizerState) -> int:
        """Bytes beside the state while it is updated, where a rehearsal of the method's own optimiser does not tell them."""
        sizes = [value.numel() for value in self.rehearsal.optimizer.state]
        return update_bytes(sizes) if kind == "8bit" else 0


def plan_run(config: RunConfig, scenario: Scenario, device: torch.device) -> MemoryPlan | None:
    """:func:`plan_memory` of a configured run; None for a method that takes no optimiser steps.

    Raises:
        MemoryBudgetError: nothing fits.
        ValueError: the model is unknown or has to be loaded and cannot be, or an option does not go with the method.
    """
    method = find_method(config.method)
    if not method.trains or method.closed_form:
        return None
    processes = ranks.joined_count()
    sharded = config.distributed == "fsdp" and processes > 1
    # Exchanges of sharded weights are rehearsed on the CPU: those of a GPU ask for its streams.
    backbone = model_shapes(config, torch.device("cpu") if sharded else device)
    return plan_memory(
        method,
        config.effective_settings(),
        backbone,
        scenario.tasks,
        scenario.reference,
        config.memory_bytes,
        levers=config.levers,
        processes=processes,
        sharded=sharded,
        on_gpu=device.type != "cpu",
        evaluated=config.evaluation.images_together,
    )


def model_shapes(config: RunConfig, device: torch.device) -> Backbone:
    """The model that will be trained on ``device``, without its weights where they need not be read to know its shapes.

    Raises:
        ValueError: the model is unknown or has to be loaded and cannot be.
    """
    if config.model == "mini" or config.model.startswith("local-dir:"):
        backbone = load_backbone(config.model, config.pretrained)
    else:
        network, *rest = shapes_of_open_clip(config.model)
        backbone = Backbone(network, *rest, name=config.model, device="meta")
    backbone.device = device
    return backbone


def give_back_freed_memory() -> None:
    """Let the C library return what is free to the system, and from now on every freed block of half a megabyte, if it is glibc.

    What it keeps would count as the process's own, and hold tensors later: 140 MiB after a ViT-B/16 of two blocks was built.
    Otherwise it raises that bound to 32 MiB by itself, and activations of many sizes leave gaps: ZSCL on ViT-B/16 held a seventh
    more than its tensors. An image of 224² in fp32 is such a block too: 19 MiB of those of a batch of 32 stayed behind. New memory
    costs page faults, which a run without a budget is spared.
    """
    library = ctypes.CDLL(None)
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 19)
    if trim is not None:
        trim(0)


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

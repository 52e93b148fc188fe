"""How many images an evaluation scores together: as many as the memory that is left holds, chosen before the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches, leaving_out_middle_parts
from cl_methods.evaluation.options import USUAL_BATCH, evaluated_images
from cl_methods.methods.base import Method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.memory.live import LiveMemory
from cl_methods.training.memory.plan import RESERVE, MemoryPlan
from cl_methods.training.planning.counting import blank_backbone
from cl_methods.training.planning.without_data import without_data
from cl_methods.training.sizes import format_size

LARGEST = 512
"""On a GPU: 100,000 tokens of ViT-B/16 in one product, beyond which there is nothing to gain; a batch is read whole by a worker."""

_CPU_CACHE = 40 << 20
"""Bytes of a pass on a CPU. With 1 and 2 threads of an EPYC (Zen 4) ViT-B/16 encodes 22 % more images a second four at a time
(33 MiB) than 32 at a time, ViT-B/32 16 to 19 % more 16 at a time than 128; the model of ``mini`` is as fast with 64 as with 128."""

_COPIES = 3
"""Copies of the weights that a method may come to hold in the course of a run, where no memory plan says how much it does."""

_PER_PROCESS = 4
"""Batches for each process, at least, so that none is left waiting for the others for long."""

_PROBES = (64, 128)
"""Images of the passes that are counted; memory is linear in between and beyond."""


@dataclass(frozen=True)
class EvaluationBatch:
    """The decision.

    Attributes:
        images: scored together.
        reason: why so many, as a phrase.
        by_memory: whether it is what the memory holds.
    """

    images: int
    reason: str
    by_memory: bool = False

    @property
    def sentence(self) -> str:
        """The decision in words."""
        return f"evaluation: {self.images} images at a time ({self.reason})"


def choose_batch(
    config: RunConfig,
    scenario: Scenario,
    method: type[Method],
    device: torch.device,
    *,
    plan: MemoryPlan | None = None,
    earlier: int | None = None,
) -> EvaluationBatch:
    """The number of images that ``evaluation.batch_size`` stands for.

    Args:
        config: of the run.
        scenario: its tasks.
        method: what is evaluated.
        device: where.
        plan: the memory plan of the run, if it has one: then the budget counts, with everything that training holds.
        earlier: the number that the run began with, which a resumed one keeps.
    """
    asked = config.evaluation.batch_size
    if asked != "auto":
        return EvaluationBatch(asked, "as asked for")
    if earlier is not None:
        return EvaluationBatch(earlier, "as when the run began")
    if method.couples(config.effective_settings()):
        return EvaluationBatch(USUAL_BATCH, "the published number, on which decisions about a batch depend")
    needed = partial(_counted, config.model, config.pretrained, _frozen_part(plan))
    on_cpu = device.type == "cpu"
    most = max(_powers(needed)) if on_cpu else LARGEST
    images = sum(len(evaluated_images(task, config.evaluation)) for task in scenario.tasks)
    processes = ranks.joined_count()
    if processes > 1:
        most = max(1, min(most, images // (_PER_PROCESS * processes)))
    left = _bytes_left(config, device, plan)
    if left is None:
        return EvaluationBatch(most, "auto: on a CPU, as many as its caches hold")
    fits = fitting(needed, left)
    chosen = max(1, min(most, fits))
    return EvaluationBatch(chosen, f"auto: {format_size(left)} are left, which hold {fits:,}", by_memory=True)


def _powers(needed: Callable[[int], int]) -> Iterator[int]:
    """Powers of two up to the usual number whose pass stays in the caches of a CPU; one does anyway."""
    yield 1
    yield from (count for count in (2, 4, 8, 16, 32, 64, USUAL_BATCH) if needed(count) <= _CPU_CACHE)


def with_batch(config: RunConfig, images: int) -> RunConfig:
    """``config`` with the number in place of `auto`."""
    return replace(config, evaluation=replace(config.evaluation, batch_size=images))


def fitting(needed: Callable[[int], int], left: int) -> int:
    """The largest number of images whose pass needs at most ``left`` bytes; 0 if not even one fits.

    Args:
        needed: bytes of a pass of so many images, linear from 64 on.
        left: bytes.
    """
    few, many = (needed(count) for count in _PROBES)
    each = max(1.0, (many - few) / (_PROBES[1] - _PROBES[0]))
    if left >= few:
        return int(_PROBES[0] + (left - few) / each)
    return max((count for count in range(1, _PROBES[0]) if needed(count) <= left), default=0)


def pass_bytes(backbone: Backbone, images: int, part: int | None = None) -> int:
    """The most bytes that are alive while images go through the image tower without gradients, pixels included, weights not.

    Args:
        backbone: its weights may be on the device ``meta``; the images are where they are.
        images: how many.
        part: of which so many go through together; None: all.
    """
    side = backbone.eval_transform(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
    before, weights = backbone.micro_batches, [*backbone.model.parameters(), *backbone.model.buffers()]
    backbone.micro_batches = None if part is None else MicroBatches(frozen_images=part)
    try:
        with (
            torch.no_grad(),
            without_data(),
            leaving_out_middle_parts(),
            ranks.alone(),
            LiveMemory(meta=True) as memory,
        ):
            for value in weights:
                memory.leave_out(value)
            backbone.encode_images(torch.empty(images, *side, device=weights[0].device))
            return memory.peak
    finally:
        backbone.micro_batches = before


@lru_cache(maxsize=256)
def _counted(model: str, pretrained: str | None, part: int | None, images: int) -> int:
    return pass_bytes(_shapes(model, pretrained), images, part)


@lru_cache(maxsize=1)
def _shapes(model: str, pretrained: str | None) -> Backbone:
    return blank_backbone(model, pretrained)


def _frozen_part(plan: MemoryPlan | None) -> int | None:
    return None if plan is None or plan.micro_batches is None else plan.micro_batches.frozen_images


def _bytes_left(config: RunConfig, device: torch.device, plan: MemoryPlan | None) -> int | None:
    """Bytes for the images of an evaluation; None where nothing bounds them."""
    if plan is not None and plan.budget is not None:
        between = plan.process + plan.model + plan.carried + plan.optimiser + plan.gradients
        held = max(between, plan.process + plan.outside)  # sharded weights are whole while images are scored
        return max(0, int((1 - RESERVE) * plan.budget) - held)
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = _shapes(config.model, config.pretrained).model.parameters()
    weights = sum(value.numel() * value.element_size() for value in parameters)
    return max(0, int((1 - RESERVE) * free) - _COPIES * weights)

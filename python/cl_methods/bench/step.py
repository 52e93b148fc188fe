"""Suite ``step``: whole training steps of every method, two of them beside the public procedure."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cl_kernels as clk
from cl_methods.backbone import Backbone, prompt
from cl_methods.backbone.quick_gelu import separate_quick_gelu
from cl_methods.backbone.self_attention import separate_attention
from cl_methods.bench.agreement import compare, full_precision
from cl_methods.bench.counting import Counting
from cl_methods.bench.measuring import interleaved, live_memory, peak_memory
from cl_methods.bench.own_step import OwnStep, own_steps
from cl_methods.bench.public_moe_adapters import PublicMoEAdapters
from cl_methods.bench.public_zscl import PublicZSCL, copy_weights
from cl_methods.bench.rows import OURS, Row
from cl_methods.bench.world import CAPTIONS, CPU, World, fresh, mini_world, open_clip_world
from cl_methods.methods import METHODS

PUBLIC = "public procedure"
PUBLISHED_BATCH = 64
_CHECKED_CAPTIONS = 64
_PEAKS = 3
"""Steps whose peak is measured: in the first the allocator still holds what the checks before left it."""
FLOOR = "finetune"
"""The method whose step every other one is set beside: a forward and a backward pass of both towers and nothing else."""


@dataclass(frozen=True)
class StepOptions:
    """What suite ``step`` measures.

    Attributes:
        model: `mini` or an open_clip name.
        methods: their names; empty for every trained one.
        batch: images per timed step of an open_clip model; counts are those of the published batch.
        captions: captions of a timed ZSCL step; as many per image as published when None.
        rounds: timed rounds of each step and its peer.
        time: False counts only.
        device: where steps with values are taken. Counts at the published size are of tensors without values, on the CPU.
    """

    model: str = "mini"
    methods: tuple[str, ...] = ()
    batch: int = 4
    captions: int | None = None
    rounds: int = 5
    time: bool = True
    device: torch.device = CPU

    @property
    def chosen(self) -> list[str]:
        """Names of the methods.

        Raises:
            ValueError: a name is not that of a trained method.
        """
        trained = [name for name, method in METHODS.items() if method.trains]
        for name in self.methods:
            if name not in trained:
                raise ValueError(f"methods: expected names of trained methods ({', '.join(trained)}), got {name!r}")
        return [name for name in trained if not self.methods or name in self.methods]


def step_suite(options: StepOptions, note: Callable[[str], None] = lambda _: None) -> list[Row]:
    """All rows: exact counts of every method's step, then the two public procedures, checked, counted and timed.

    Args:
        options: see there.
        note: told what is being done.

    Raises:
        CheckError: ours and the public procedure differ in loss or gradients by more than 1e-5.
        ValueError: an option is wrong.
    """
    world = mini_world(device=options.device) if options.model == "mini" else open_clip_world(options.model)
    floor = None if world.shapes or not options.time else own_steps(FLOOR, world)["train"]
    rows: list[Row] = []
    for name in options.chosen:
        note(f"{name} on {world.model}")
        rows += count_method(name, world, options, floor)
    del world, floor
    return rows + public_rows(options, note)


def public_rows(options: StepOptions, note: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Rows of the methods of which the public procedure is restated here, as far as they were chosen."""
    chosen, rows = options.chosen, []
    if "zscl" in chosen:
        note("ZSCL beside its public procedure")
        rows += zscl_rows(options)
    if "moe_adapters" in chosen:
        note("MoE-Adapters beside its public procedure")
        rows += moe_adapters_rows(options)
    return rows


def count_method(name: str, world: World, options: StepOptions, floor: OwnStep | None = None) -> Iterator[Row]:
    """Exact counts of a step of every stage of a method; timed beside ``floor``, the step of continual fine-tuning."""
    for stage, step in own_steps(name, world).items():
        label = f"{name}, {world.model}" if stage in ("train", "pass") else f"{name} {stage}, {world.model}"
        row = Row(label, exact=counts_of(step, world.shapes))
        if options.time and not world.shapes:
            row.checked = check_kernels(label, step)
            work = {OURS: step.run} | ({} if floor is None or name == FLOOR else {FLOOR: floor.run})
            times = interleaved(work, options.rounds, step.method.backbone.device)
            row.measured["seconds"] = times[OURS]
            yield row
            if FLOOR in times:
                yield Row(label, f"{FLOOR} step", measured={"seconds": times[FLOOR]})
        else:
            yield row


def check_kernels(case: str, step: OwnStep) -> dict[str, float]:
    """Errors of loss and gradients against the same step on the kernels' plain PyTorch definition; none in closed form.

    Raises:
        CheckError: one of them exceeds 1e-5.
    """
    if step.optimizer is None:
        return {}
    with full_precision():
        with clk.use_backend("reference"):
            expected = step.gradients()
        return compare(case, step.gradients(), expected)


def counts_of(step: Any, shapes: bool) -> dict[str, int]:
    """Counts of one whole step after another one; without values that of an :class:`OwnStep` leaves out ``after_step``.

    Without values no operations are reported: an operation on a list of tensors falls apart into one for each of them there.
    """
    work = step.run_shapes if shapes and isinstance(step, OwnStep) else step.run
    work()  # the first step creates the optimiser's moments
    with Counting(step.on_device()) as counting:
        work()
    counts = counting.counts.as_dict()
    if shapes:
        del counts["operations"]
    return counts


def zscl_rows(options: StepOptions) -> list[Row]:
    """ZSCL with its published terms beside the public procedure; counts at the published size, times at one that fits."""
    settings = METHODS["zscl"].default_config("mtil")
    if options.model == "mini":
        return _pair(
            f"ZSCL, mini, batch {PUBLISHED_BATCH}, 1,000 captions",
            *_zscl(mini_world(1000, options.device), settings),
            options,
        )
    rows: list[Row] = []
    world = open_clip_world(options.model)
    case = f"ZSCL, {options.model}, batch {PUBLISHED_BATCH}, {CAPTIONS:,} captions, 100 classes"
    ours, public = _zscl(world, settings)
    public_counts = counts_of(public, True)
    for kind in ("new reference images", "reference images met before"):
        rows += [Row(f"{case}, {kind}", exact=counts_of(ours, True)), Row(f"{case}, {kind}", PUBLIC, public_counts)]
        ours.forget = None
    del world, ours, public
    if options.time:
        captions = options.captions or round(CAPTIONS / PUBLISHED_BATCH * options.batch)
        classes = max(2, round(100 / PUBLISHED_BATCH * options.batch))
        case = f"ZSCL, {options.model}, batch {options.batch}, {captions:,} captions, {classes} classes"
        sizes: dict[str, Any] = {"shapes": False, "class_count": classes, "device": options.device}
        few = open_clip_world(options.model, min(captions, _CHECKED_CAPTIONS), **sizes)
        errors = check(f"{case} (the first {_CHECKED_CAPTIONS})", *_zscl(few, settings, options.batch))
        del few
        real = open_clip_world(options.model, captions, **sizes)
        pair = _pair(case, *_zscl(real, settings, options.batch), options, checked=True, counted=False)
        pair[0].checked = errors
        rows += pair
    return rows


def _zscl(world: World, settings: Any, batch: int | None = None) -> tuple[OwnStep, PublicZSCL]:
    ours = own_steps("zscl", world, settings, batch)["train"]
    method: Any = ours.method
    ours.forget = method.teacher.forget_images  # of a set as large as ImageNet most images are met for the first time
    backbone = _public_backbone(world)
    if not world.shapes:
        _leave_start(ours)
        copy_weights(method.backbone.model, backbone.model)
    task = world.tasks[ours.task_index]
    class_tokens = _class_tokens(method, task)
    with fresh(world.shapes):
        tokens = (
            torch.zeros(len(world.reference.captions), class_tokens.shape[1], dtype=torch.int64)
            if world.shapes
            else backbone.tokenize(world.reference.captions)
        )
    return ours, PublicZSCL(ours, backbone.model, class_tokens, tokens.to(backbone.device))


def moe_adapters_rows(options: StepOptions) -> list[Row]:
    """MoE-Adapters beside the public procedure: checked without dropout, which draws other bits, counted and timed with it."""
    settings = METHODS["moe_adapters"].default_config("mtil")
    if options.model == "mini":
        world, batch, size = mini_world(device=options.device), None, PUBLISHED_BATCH
    else:
        classes = max(2, round(100 / PUBLISHED_BATCH * options.batch))
        world = open_clip_world(options.model, 0, shapes=False, class_count=classes, device=options.device)
        batch, size = options.batch, options.batch
    case = f"MoE-Adapters, {options.model}, batch {size}, {len(world.tasks[1].class_names)} classes"
    errors = check(case, *_moe_adapters(world, replace(settings, dropout=0.0), batch))
    pair = _pair(case, *_moe_adapters(world, settings, batch), options, checked=True)
    pair[0].checked = errors
    return pair


def _moe_adapters(world: World, settings: Any, batch: int | None) -> tuple[OwnStep, PublicMoEAdapters]:
    ours = own_steps("moe_adapters", world, settings, batch)["train"]
    _leave_start(ours)
    class_tokens = _class_tokens(ours.method, world.tasks[ours.task_index])
    return ours, PublicMoEAdapters(ours, _public_backbone(world), class_tokens)


def _public_backbone(world: World) -> Backbone:
    """A fresh model whose blocks run open_clip's own code alone."""
    backbone = world.backbone()
    separate_attention(backbone.model)
    separate_quick_gelu(backbone.model)
    return backbone


def _class_tokens(method: Any, task: Any) -> Tensor:
    tokens = method.backbone.tokenize([prompt(task.templates[0], name) for name in task.class_names])
    return tokens.to(method.backbone.device)


def _leave_start(step: OwnStep) -> None:
    """Move every trained weight a little: at the start adapters are zero and a student equals its teacher, which proves nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in step.method.trainable():
            spread = value.std() if value.numel() > 1 and value.abs().max() > 0 else torch.tensor(0.02)
            value.add_(torch.randn(value.shape, generator=generator).to(value) * spread * 0.05)


def check(case: str, ours: OwnStep, public: Any) -> dict[str, float]:
    """Errors of loss and gradients of ours against those of the public procedure.

    Raises:
        CheckError: one of them exceeds 1e-5, and twice the public procedure's own error against float64.
    """
    with full_precision():
        (loss, gradients), expected = ours.gradients(), public.gradients()
        renamed = {re.sub(r"\.(routers|noises)\.\d+$", r".\1", name): value for name, value in gradients.items()}
        return compare(case, (loss, renamed), expected, public.exact_gradients)


def _pair(
    case: str, ours: OwnStep, public: Any, options: StepOptions, *, checked: bool = False, counted: bool = True
) -> list[Row]:
    """Two rows: counts, and after a green check times and memory.

    Args:
        case: what both do.
        ours, public: the two.
        options: rounds, and whether to measure at all.
        checked: whether the caller has checked them already.
        counted: whether to count them here.
    """
    errors = {} if checked else check(case, ours, public)
    rows = [Row(case, checked=errors), Row(case, PUBLIC)]
    steps = {row.implementation: step for row, step in zip(rows, (ours, public), strict=True)}
    for row in rows:
        row.exact = counts_of(steps[row.implementation], False) if counted else {}
    if options.time:
        device = ours.method.backbone.device
        for row in rows:
            step = steps[row.implementation]
            row.exact["live_bytes"] = live_memory(step.run)
            gc.collect()
            peak = peak_memory(step.run, device, _PEAKS)
            row.measured = {} if peak is None else {"peak_bytes": peak}
        times = interleaved({name: step.run for name, step in steps.items()}, options.rounds, device)
        for row in rows:
            row.measured["seconds"] = times[row.implementation]
    return rows

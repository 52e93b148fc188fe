"""What an adapter costs over the frozen model that carries it: :func:`profile_adapter`, for any two modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.profile.ceilings import measure_ceilings
from cl_kernels.profile.costs import costs
from cl_kernels.profile.launches import count_launches
from cl_kernels.profile.layers import Layer, layers, named_modules, outside_costs
from cl_kernels.profile.result import AdapterProfile, Side
from cl_kernels.profile.static import comparable_attention
from cl_kernels.profile.timing import Spread, Watch, interleaved
from cl_kernels.profile.variants import Variant, compare_layer
from cl_kernels.profile.waiting import tensors_in
from cl_kernels.profile.workload import Workload, frozen_parameters, plain_pytorch, record_step

Loss = Callable[[Any], Tensor]


def profile_adapter(
    base: nn.Module,
    adapted: nn.Module,
    inputs: Sequence[Any],
    *,
    loss: Loss | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    static: bool = False,
    rename: Callable[[str], str] | None = None,
    samples: int | None = None,
    repeats: int = 5,
    compiled: bool = False,
    true_share: float | None = None,
) -> AdapterProfile:
    """One training step of ``adapted`` beside one forward pass of the frozen ``base``: counts, memory, and times if not ``static``.

    Works for modules of any library: PEFT, timm, your own. Both must exist side by side, so copy the base before something is
    mounted on it. Counts are exact; what they count is said in :class:`~cl_kernels.profile.Cost`. Buffers change as in any
    forward pass in training mode; parameters do not, and gradients end up empty.

    Args:
        base: the model without adapter; runs without gradient.
        adapted: the same with it, and with ``requires_grad`` set as in training.
        inputs: positional arguments of both models.
        loss: of the adapted model's output; by default the mean over all floating-point outputs.
        optimizer: makes the optimiser of the trainable parameters, such as ``torch.optim.AdamW``, whose update is then part of
            the step; it is undone afterwards.
        static: count on meta tensors, copies of both models without memory: any size, no GPU, no times. Modules whose shapes
            depend on numbers (``nonzero``) need ``true_share``.
        rename: the base's name of a module of the adapted model, where a wrapper changed the names.
        samples: in the batch; by default the first dimension of the first tensor in ``inputs``.
        repeats: of every timing.
        compiled: try ``torch.compile`` on one adapted layer, which takes a while.
        true_share: share of a mask's entries that ``nonzero`` is taken to find on meta tensors.

    Raises:
        ValueError: ``inputs`` hold no tensor, nothing in ``adapted`` is trainable, or models and inputs lie on several devices.
        TypeError: ``base`` or ``adapted`` is no module.
    """
    for name, module in (("base", base), ("adapted", adapted)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
    tensors = list(tensors_in(inputs))
    if not tensors:
        raise ValueError("inputs: expected at least one tensor among the models' arguments")
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise ValueError("adapted: expected a trainable parameter, but none requires a gradient")
    devices = {str(t.device) for t in (*tensors, *base.parameters(), *adapted.parameters())}
    if len(devices) > 1 and not static:
        raise ValueError(f"inputs: expected models and inputs on one device, got {', '.join(sorted(devices))}")
    if static:
        base, adapted = (copy.deepcopy(module).to("meta") for module in (base, adapted))
        inputs = _on_meta(inputs)
        tensors = list(tensors_in(inputs))
    count = samples if samples is not None else (tensors[0].shape[0] if tensors[0].dim() else 1)

    def frozen() -> None:
        with torch.no_grad():
            base(*inputs)

    def step() -> Tensor:
        return (loss or _mean)(adapted(*inputs))

    parts = {rename(name) if rename else name: part for name, part in named_modules(adapted).items()}
    known = _Restored(adapted, optimizer)
    sides = (
        Workload(named_modules(base), tensors, frozen, samples=count),
        Workload(parts, tensors, step, known.update, samples=count, true_share=true_share),
    )
    try:
        return profile_workloads(*sides, repeats=repeats, compiled=compiled)
    finally:
        known.restore()


class _Restored:
    """An optimiser's update that can be undone."""

    def __init__(
        self, module: nn.Module, make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None
    ) -> None:
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.trained] if make is not None else []
        self.optimizer = make(self.trained) if make is not None else None

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.before, strict=False):
                parameter.copy_(value)
        for parameter in self.trained:
            parameter.grad = None


def profile_workloads(
    base: Workload,
    adapted: Workload,
    *,
    repeats: int = 5,
    compiled: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> AdapterProfile:
    """The profile of a step of ``adapted`` over one of ``base``: whoever has more to a step than two modules starts here.

    On meta tensors nothing is timed. Everywhere the adapted step is also done in plain PyTorch
    (:func:`~cl_kernels.profile.workload.plain_pytorch`), for comparison.

    Args:
        base: a forward pass of the frozen model.
        adapted: a training step; modules with the names of ``base`` are compared with those.
        repeats: of every timing.
        compiled: try ``torch.compile`` on one adapted layer.
        note: told what is being done.
    """
    timed = adapted.device.type != "meta"
    parameters = base.parameters()
    base = replace(base, context=lambda: frozen_parameters(parameters))
    with comparable_attention():
        watch = Watch(adapted.device) if timed else None
        adapted.run()  # optimisers and caches are set up in the first step
        note("counting")
        sides = {"base": _side(base, 1), "adapted": _side(adapted, 1)}
        with plain_pytorch():  # the optimiser's part is the same
            sides["eager"] = _side(replace(adapted, update=None), 1)
        rows = _rows(sides)
        if not timed or watch is None:
            return AdapterProfile(rows, sides, base.samples, adapted.device.type)
        note(f"timing whole steps, {repeats} times each")
        seconds = _time_steps(base, adapted, repeats)
        note("timing layers")
        sides["base"], sides["adapted"] = _side(base, repeats), _side(adapted, repeats)
        rows = _rows(sides)
        layer = _typical_layer(rows)
        variants: list[Variant] = []
        if layer is not None:
            note(f"comparing ways to compute {layer}" + (", which compiles it" if compiled else ""))
            variants = compare_layer(adapted, layer, repeats, compiled=compiled)
        ceilings = measure_ceilings(adapted.device)
        trust = watch.stop(seconds)
    return AdapterProfile(
        rows, sides, base.samples, adapted.device.type, seconds, variants, layer or "", ceilings, trust,
        _launches(base, adapted),
    )  # fmt: skip


def _typical_layer(rows: Sequence[Layer]) -> str | None:
    """A layer of the frozen model on which something is mounted: the second, since the first may need no gradient of its input."""
    carrying: list[str] = []
    callers: list[Layer] = []
    for row in rows:
        callers = [*callers[: row.depth], row]
        known = [caller.name for caller in callers[:-1] if caller.base is not None]
        if row.mounted and known and known[-1] not in carrying:
            carrying.append(known[-1])
    carrying = carrying or [
        row.name for row in rows if row.base is not None and row.cost.trainable and row.cost.flops_backward
    ]
    return carrying[min(1, len(carrying) - 1)] if carrying else None


def _side(work: Workload, repeats: int) -> Side:
    records = [record_step(work) for _ in range(repeats)]
    found = costs(records, work.modules)
    if not records[-1].differentiated:  # whatever it holds, a forward pass trains nothing
        for cost in found.values():
            cost.trainable = 0
    return Side(records[-1], found | outside_costs(records[-1]), sum(p.numel() for p in work.parameters()))


def _rows(sides: Mapping[str, Side]) -> list[Layer]:
    return layers(sides["adapted"].record, sides["adapted"].costs, sides["base"].costs)


def _time_steps(base: Workload, adapted: Workload, repeats: int) -> dict[str, Spread]:
    def within(work: Workload, context: Callable[[], Any]) -> None:
        with context():
            work.run()

    return interleaved(
        {
            "frozen": lambda: within(base, nullcontext),
            "eager": lambda: within(adapted, plain_pytorch),
            "fused": lambda: within(adapted, nullcontext),
        },
        repeats,
        adapted.device,
    )


def _launches(base: Workload, adapted: Workload) -> dict[str, int]:
    found = {"frozen": count_launches(base), "fused": count_launches(adapted)}
    with plain_pytorch():
        found["eager"] = count_launches(adapted)
    return {name: count for name, count in found.items() if count is not None}


def _mean(output: Any) -> Tensor:
    outputs = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not outputs:
        raise ValueError("loss: the adapted model returns no floating-point tensor; pass a loss of its output")
    return torch.stack([tensor.float().mean() for tensor in outputs]).sum()


def _on_meta(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().to("meta").requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {name: _on_meta(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_on_meta(value) for value in values)
    return values

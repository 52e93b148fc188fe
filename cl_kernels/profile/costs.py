"""What every module of a recorded step costs, with what runs inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from cl_kernels.profile.recorder import StepRecord
from cl_kernels.profile.timing import Spread

WHOLE = ""
"""The name under which the whole step is reported."""


@dataclass
class Cost:
    """Of one module, its children and whatever else runs inside its calls; everything per step.

    Attributes:
        parameters, trainable: elements of parameters.
        flops_forward, flops_backward: 2 for each multiply-add of matrix products and convolutions.
        operations_forward, operations_backward, operations_optimizer: dispatched operations that are not views.
        waits: operations at which the host would wait for a GPU.
        bytes_saved: kept from the forward for the backward pass, apart from parameters and inputs.
        bytes_moved: held by arguments and results of its operations, summed over operations.
        bytes_peak: most bytes of tensors made during the step that were alive at once while it ran.
        seconds_forward, seconds_backward, seconds_optimizer: time inside its operations; None where nothing was timed.
    """

    parameters: int = 0
    trainable: int = 0
    flops_forward: int = 0
    flops_backward: int = 0
    operations_forward: int = 0
    operations_backward: int = 0
    operations_optimizer: int = 0
    waits: int = 0
    bytes_saved: int = 0
    bytes_moved: int = 0
    bytes_peak: int = 0
    seconds_forward: Spread | None = None
    seconds_backward: Spread | None = None
    seconds_optimizer: Spread | None = None

    @property
    def flops(self) -> int:
        """Of forward and backward pass."""
        return self.flops_forward + self.flops_backward

    @property
    def operations(self) -> int:
        """Of the whole step."""
        return self.operations_forward + self.operations_backward + self.operations_optimizer

    @property
    def seconds(self) -> float | None:
        """Medians of forward and backward pass together; None where nothing was timed."""
        known = [spread.median for spread in (self.seconds_forward, self.seconds_backward) if spread is not None]
        return sum(known) if known else None

    def minus(self, other: Cost) -> dict[str, int | float | None]:
        """Differences of all counts, and of the medians of the times."""
        found: dict[str, int | float | None] = {
            entry.name: getattr(self, entry.name) - getattr(other, entry.name)
            for entry in fields(self)
            if not entry.name.startswith("seconds")
        }
        for name in ("seconds_forward", "seconds_backward", "seconds_optimizer"):
            mine, theirs = getattr(self, name), getattr(other, name)
            found[name] = None if mine is None else mine.median - (0.0 if theirs is None else theirs.median)
        return found


def costs(records: Sequence[StepRecord], modules: Mapping[str, nn.Module]) -> dict[str, Cost]:
    """{name: cost} of the modules that own parameters or ran, :data:`WHOLE` for the step; in the order of ``modules``.

    Counts are those of the last record, times the spread over all of them.

    Args:
        records: of the same step, repeated.
        modules: by the names that they were recorded under.

    Raises:
        ValueError: there is no record.
    """
    if not records:
        raise ValueError("records: expected at least one")
    found = {WHOLE: Cost(), **{name: Cost() for name in modules}}
    _count_parameters(found, modules)
    _count_operations(found, records[-1])
    for stack, size in records[-1].saved:
        for name in {WHOLE, *stack}:
            found[name].bytes_saved += size
    if records[-1].timed:
        _spread_times(found, records)
    kept = {name: cost for name, cost in found.items() if name == WHOLE or cost.operations or cost.parameters}
    return kept


def _count_parameters(found: dict[str, Cost], modules: Mapping[str, nn.Module]) -> None:
    every = {id(p): p for module in modules.values() for p in module.parameters()}
    for name, parameters in ((WHOLE, every.values()), *((name, m.parameters()) for name, m in modules.items())):
        for parameter in parameters:
            found[name].parameters += parameter.numel()
            found[name].trainable += parameter.numel() * parameter.requires_grad


def _count_operations(found: dict[str, Cost], record: StepRecord) -> None:
    for operation in record.operations:
        for name in {WHOLE, *operation.stack}:
            cost = found[name]
            if operation.phase == "forward":
                cost.flops_forward += operation.flops
                cost.operations_forward += 1
            elif operation.phase == "backward":
                cost.flops_backward += operation.flops
                cost.operations_backward += 1
            else:
                cost.operations_optimizer += 1
            cost.waits += operation.waits
            cost.bytes_moved += operation.bytes
            cost.bytes_peak = max(cost.bytes_peak, operation.live)


def _spread_times(found: dict[str, Cost], records: Iterable[StepRecord]) -> None:
    samples: dict[tuple[str, str], list[float]] = {}
    for number, record in enumerate(records, start=1):
        for operation in record.operations:
            for name in {WHOLE, *operation.stack}:
                times = samples.setdefault((name, operation.phase), [])
                times += [0.0] * (number - len(times))
                times[-1] += operation.seconds
    for (name, phase), times in samples.items():
        setattr(found[name], f"seconds_{phase}", Spread.of(times))

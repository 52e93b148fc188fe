"""A finished profile: its table, its sentences, and the files that machines read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cl_kernels.profile.ceilings import Ceilings
from cl_kernels.profile.costs import WHOLE, Cost
from cl_kernels.profile.layers import Layer
from cl_kernels.profile.recorder import StepRecord
from cl_kernels.profile.timing import Spread, Trust
from cl_kernels.profile.trace import chrome_trace
from cl_kernels.profile.variants import Variant

COUNTS = (
    "parameters", "trainable", "flops_forward", "flops_backward", "operations_forward", "operations_backward",
    "operations_optimizer", "waits", "bytes_saved", "bytes_moved", "bytes_peak",
)  # fmt: skip
TIMES = ("seconds_forward", "seconds_backward", "seconds_optimizer")


@dataclass(frozen=True)
class Side:
    """One recorded step.

    Attributes:
        record: its last repetition, operation by operation.
        costs: by module.
        parameters: of all its modules.
    """

    record: StepRecord
    costs: dict[str, Cost]
    parameters: int

    @property
    def whole(self) -> Cost:
        """Of the step."""
        return self.costs[WHOLE]


@dataclass(frozen=True)
class AdapterProfile:
    """What an adapter costs over the frozen model.

    Attributes:
        layers: the rows of the table.
        sides: ``base`` (the frozen forward pass), ``adapted`` (the training step) and ``eager`` (its forward and backward pass in
            plain PyTorch).
        samples: of the batch.
        device: kind of device, ``meta`` if nothing was computed.
        seconds: of whole steps, ``frozen``, ``eager`` and ``fused``, measured in turn; empty for meta tensors.
        variants: of one layer, on the same tensors.
        variants_layer: that layer's name.
        ceilings: of the machine, measured in the same run.
        trust: whether the times are to be believed.
        launches: kernels launched per step, by the names of ``seconds``; empty where there is no GPU.
        subject: what was profiled, for headings.
        details: whatever else belongs into the files: versions, settings.
    """

    layers: list[Layer]
    sides: dict[str, Side]
    samples: int
    device: str
    seconds: dict[str, Spread] = field(default_factory=dict)
    variants: Sequence[Variant] = ()
    variants_layer: str = ""
    ceilings: Ceilings | None = None
    trust: Trust | None = None
    launches: dict[str, int] = field(default_factory=dict)
    subject: str = "the adapter"
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether there are times."""
        return bool(self.seconds)

    @property
    def mounted(self) -> frozenset[str]:
        """Names of the modules that train and that the frozen model has nothing like."""
        found, known = self.sides["adapted"].costs, self.sides["base"].costs
        return frozenset(name for name, cost in found.items() if name not in known and cost.trainable)

    def own_share(self) -> tuple[float, float | None]:
        """How much of the training step is the model's own: (of its FLOPs, of the time inside its operations).

        Its own is what modules of the base do, forward and backward. The rest is what is mounted on them, the loss, other models
        that the step asks, and the optimiser. No time where nothing was timed.
        """
        operations, known = self.sides["adapted"].record.operations, self.sides["base"].costs
        own = [operation for operation in operations if operation.stack and operation.stack[-1] in known]
        flops = sum(o.flops for o in own) / max(sum(o.flops for o in operations), 1)
        if not self.timed:
            return flops, None
        return flops, sum(o.seconds for o in own) / max(sum(o.seconds for o in operations), 1e-12)

    def headline(self) -> str:
        """The costs in one sentence or two, with a warning if the times are not to be trusted."""
        base, adapted, eager = (self.sides[name].whole for name in ("base", "adapted", "eager"))
        known = self.sides["base"].parameters
        share = f"{adapted.trainable / max(known, 1):.1%}"
        waits = f"{adapted.waits:,}" if adapted.waits else "no"
        text = (
            f"{self.subject} trains {count(adapted.trainable).strip()} parameters ({share} of the frozen "
            f"model's {count(known).strip()}), costs {_change(adapted.flops_forward, base.flops_forward)} forward and "
            f"{count(adapted.flops_backward)}FLOP backward, dispatches {adapted.operations:,} operations per training step beside "
            f"{base.operations:,} in a frozen forward pass, with {waits} host synchronisations, and keeps "
            f"{size(adapted.bytes_saved)} for the backward pass ({size(adapted.bytes_peak)} at the peak)."
        )
        flops, seconds = self.own_share()
        text += f" Of the step's FLOPs {flops:.1%} are the model's own"
        text += "." if seconds is None else f", and of the time inside its operations {seconds:.1%}."
        ours, theirs = (cost.operations_forward + cost.operations_backward for cost in (adapted, eager))
        if theirs > ours:
            text += f" Fused kernels dispatch {1 - ours / theirs:.0%} fewer operations forward and backward than plain PyTorch"
            waiting = f", and wait for the device {adapted.waits:,} times a step instead of {eager.waits:,}."
            text += waiting if eager.waits > adapted.waits else "."
        if self.timed:
            frozen, plain, fused = (self.seconds[name].median for name in ("frozen", "eager", "fused"))
            text += (
                f" A training step takes {duration(fused)}, {duration(plain)} in plain PyTorch, and the frozen forward pass "
                f"{duration(frozen)}."
            )
        return text + (" " + self.warning() if self.warning() else "")

    def warning(self) -> str:
        """Why the times are not to be trusted; empty if they are, or if there are none."""
        if self.trust is None or self.trust.trustworthy:
            return ""
        return "These times are not to be trusted: " + "; ".join(self.trust.reasons) + "."

    def as_dict(self) -> dict[str, Any]:
        """Everything but single operations, as JSON values."""
        return {
            "headline": self.headline(),
            "own_share": dict(zip(("flops", "seconds"), self.own_share(), strict=True)),
            "subject": self.subject,
            "samples": self.samples,
            "device": self.device,
            "details": self.details,
            "totals": {name: asdict(side.whole) for name, side in self.sides.items()},
            "layers": [
                {
                    "name": layer.name,
                    "depth": layer.depth,
                    "mounted": layer.mounted,
                    "adapted": asdict(layer.cost),
                    "frozen": None if layer.base is None else asdict(layer.base),
                    "difference": layer.difference(),
                }
                for layer in self.layers
            ],
            "modules": {name: asdict(cost) for name, cost in self.sides["adapted"].costs.items() if name != WHOLE},
            "launches": self.launches,
            "seconds": {name: asdict(spread) for name, spread in self.seconds.items()},
            "variants": {"layer": self.variants_layer, "rows": [asdict(variant) for variant in self.variants]},
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "trust": None if self.trust is None else {"trustworthy": self.trust.trustworthy, **asdict(self.trust)},
            "memory": [operation.live for operation in self.sides["adapted"].record.operations],
        }

    def csv(self) -> str:
        """The table: one line per layer with its counts and times, those of the frozen model, and the differences."""
        stream = io.StringIO()
        times = [f"{name}_{part}" for name in TIMES for part in ("median", "p20", "p80")]
        writer = csv.writer(stream, lineterminator="\n")
        names = [*COUNTS, *times]
        changes = [f"difference_{name}" for name in (*COUNTS, *TIMES)]
        writer.writerow(["layer", "depth", *names, *(f"frozen_{name}" for name in names), *changes])
        for layer in self.layers:
            change = layer.difference()
            values = [_cell(change[name]) for name in (*COUNTS, *TIMES)]
            writer.writerow([layer.name, layer.depth, *_values(layer.cost), *_values(layer.base), *values])
        return stream.getvalue()

    def save(self, folder: Path | str) -> list[Path]:
        """Write ``profile.json``, ``profile.csv`` and ``trace.json`` (for ui.perfetto.dev or chrome://tracing).

        Args:
            folder: made if it does not exist; files of an earlier profile are replaced.

        Returns:
            The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        records = {name: self.sides[name].record for name in ("base", "adapted", "eager")}
        texts = {
            "profile.json": json.dumps(self.as_dict(), indent=1),
            "profile.csv": self.csv(),
            "trace.json": json.dumps(chrome_trace(records)),
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
        return [folder / name for name in texts]

    def text(self) -> str:
        """The table for a terminal."""
        head = ("layer", "trainable", "Δ FLOPs fwd", "FLOPs bwd", "Δ ops", "Δ saved", "waits", "Δ ms")
        rows = [head]
        for layer in self.layers:
            change = layer.difference()
            operations = sum(int(change[name] or 0) for name in COUNTS if name.startswith("operations"))
            times = [value for name in TIMES if (value := change[name]) is not None]
            rows.append(
                (
                    "  " * layer.depth + layer.name, count(layer.cost.trainable), f"{count(int(change['flops_forward'] or 0))}",
                    count(layer.cost.flops_backward), f"{operations:+,}", size(int(change["bytes_saved"] or 0)),
                    f"{layer.cost.waits}", f"{1000 * sum(times):.2f}" if times else "–",
                )
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = []
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        return "\n".join(lines)


def count(number: float) -> str:
    """``1.23 M``, with the SI prefixes up to P."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.2f} {prefix}"
    return f"{number:.0f} "


def size(number: float) -> str:
    """Bytes with a decimal prefix."""
    return f"{count(number)}B"


def duration(seconds: float) -> str:
    """Seconds with a fitting unit, three digits."""
    factor, unit = time_unit(seconds)
    return f"{digits(seconds / factor)} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit that fits, in seconds, and its symbol."""
    return next(((f, u) for f, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= f), (1e-6, "µs"))


def digits(number: float) -> str:
    """Three significant ones."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _change(new: float, old: float) -> str:
    if not old:
        return f"{count(new)}FLOP"
    return f"{abs(new / old - 1):.1%} {'more' if new >= old else 'fewer'} FLOPs"


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _values(cost: Cost | None) -> list[Any]:
    if cost is None:
        return [""] * (len(COUNTS) + 3 * len(TIMES))
    found: list[Any] = [getattr(cost, name) for name in COUNTS]
    for name in TIMES:
        spread = getattr(cost, name)
        found += ["", "", ""] if spread is None else [spread.median, spread.p20, spread.p80]
    return found

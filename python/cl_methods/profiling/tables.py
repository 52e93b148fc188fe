"""The tables of a profile, as text cells: whole step, per sample, layers, variants of one layer, machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_kernels.profile import AdapterProfile, Cost, Layer, Spread
from cl_kernels.profile.result import count, digits, duration, size, time_unit

NONE = "–"


@dataclass(frozen=True)
class PlainTable:
    """Title, column names and cells; the first column is text, the others are numbers.

    Attributes:
        title: heading.
        columns: names.
        rows: cells.
        mounted: numbers of the rows that the frozen model lacks.
        note: what to know for reading it.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    mounted: frozenset[int] = frozenset()
    note: str = ""


def all_tables(profile: AdapterProfile) -> list[PlainTable]:
    """Every table that there is something to say in."""
    found = [whole_step(profile), per_sample(profile)]
    if profile.variants:
        found.append(variants(profile))
    found.append(layers(profile))
    if profile.ceilings is not None:
        found.append(machine(profile))
    return found


def whole_step(profile: AdapterProfile) -> PlainTable:
    """Frozen forward pass, training step, their difference, and the same in plain PyTorch."""
    base, adapted, eager = (profile.sides[name].whole for name in ("base", "adapted", "eager"))
    rows = [
        ("parameters", *_counts(base.parameters, adapted.parameters), NONE),
        ("trainable", *_counts(base.trainable, adapted.trainable), NONE),
        ("FLOPs forward", *_counts(base.flops_forward, adapted.flops_forward, True), count(eager.flops_forward)),
        ("FLOPs backward", *_counts(0, adapted.flops_backward), count(eager.flops_backward)),
        (
            "operations forward",
            *_whole(base.operations_forward, adapted.operations_forward),
            f"{eager.operations_forward:,}",
        ),
        ("operations backward", *_whole(0, adapted.operations_backward), f"{eager.operations_backward:,}"),
        ("operations of the optimiser", *_whole(0, adapted.operations_optimizer), NONE),
        ("host synchronisations", *_whole(base.waits, adapted.waits), f"{eager.waits:,}"),
        ("kept for backward", *_sizes(base.bytes_saved, adapted.bytes_saved), size(eager.bytes_saved)),
        ("peak of the step's tensors", *_sizes(base.bytes_peak, adapted.bytes_peak), size(eager.bytes_peak)),
    ]
    flops, seconds = profile.own_share()
    rows.append(("FLOPs in the model's own modules", f"{1:.1%}", f"{flops:.1%}", NONE, NONE))
    if seconds is not None:
        rows.append(("time in the model's own modules", NONE, f"{seconds:.1%}", NONE, NONE))
    if profile.launches:
        told = profile.launches
        rows.append(("kernel launches", *_whole(told["frozen"], told["fused"]), f"{told['eager']:,}"))
    if profile.timed:
        frozen, fused, plain = (profile.seconds[name] for name in ("frozen", "fused", "eager"))
        rows.append(("time", spread(frozen), spread(fused), _plus(fused.median - frozen.median), spread(plain)))
    return PlainTable(
        f"Training step of {profile.samples} samples",
        ("", "frozen, forward", "training step", "difference", "plain PyTorch"),
        rows,
    )


def per_sample(profile: AdapterProfile) -> PlainTable:
    """Outermost modules, with figures per sample of the batch."""
    rows = []
    for layer in profile.layers:
        if layer.depth or not layer.cost.flops:
            continue
        base = layer.base or Cost()
        change = f"{layer.cost.flops_forward / base.flops_forward - 1:+.2%}" if base.flops_forward else "new"
        per = profile.samples
        rows.append(
            (
                layer.name, count(base.flops_forward / per), count(layer.cost.flops_forward / per), change,
                count(layer.cost.flops_backward / per), size(layer.cost.bytes_saved / per),
            )
        )  # fmt: skip
    columns = ("", "FLOPs forward, frozen", "FLOPs forward", "change", "FLOPs backward", "kept for backward")
    return PlainTable("Per sample of the batch, outermost modules", columns, rows)


def variants(profile: AdapterProfile) -> PlainTable:
    """The ways to compute one layer, on the same tensors."""
    eager = next((v.seconds.median for v in profile.variants if v.name == "eager" and v.seconds is not None), None)
    rows = []
    for variant in profile.variants:
        if variant.seconds is None:
            rows.append((f"{variant.name}: {variant.reason}", *(NONE,) * 5))
            continue
        ratio = NONE if eager is None else f"{eager / variant.seconds.median:.2f}"
        operations = NONE if variant.operations is None else f"{variant.operations:,}"
        errors = (_error(variant.output_error), _error(variant.gradient_error))
        rows.append((variant.name, spread(variant.seconds), ratio, operations, *errors))
    return PlainTable(
        f"Forward and backward pass of {profile.variants_layer}",
        ("", "time", "times faster", "operations", "output error", "gradient error"),
        rows,
        note="eager: plain PyTorch; compiled: the same through torch.compile; fused: this library's kernels. Errors: largest "
        "absolute difference over largest absolute value, fused against the reference with the same random numbers, "
        "compiled against eager.",
    )


def layers(profile: AdapterProfile) -> PlainTable:
    """A row per layer: its costs, and what it costs more than in the frozen model."""
    columns = [
        "layer", "parameters", "trainable", "FLOPs forward", "Δ", "backward", "operations forward", "Δ", "backward",
        "waits", "kept Δ", "peak Δ",
    ]  # fmt: skip
    if profile.timed:
        columns += ["time forward", "Δ", "backward"]
    rows = [_layer(layer, profile.timed) for layer in profile.layers]
    new = frozenset(number for number, layer in enumerate(profile.layers) if layer.mounted)
    return PlainTable(
        "Layers", tuple(columns), rows, new,
        "Every row includes what runs inside its calls. Δ: training step minus frozen forward pass. Orange rows are what is "
        "mounted. Backward: of what stands to the left of it. Waits: host synchronisations. Kept: for the backward pass. Peak: "
        "most bytes of the step's tensors alive while the layer ran.",
    )  # fmt: skip


def machine(profile: AdapterProfile) -> PlainTable:
    """Ceilings, load and calibration."""
    assert profile.ceilings is not None
    rows = [
        ("matrix product", f"{count(profile.ceilings.flops_per_second)}FLOP/s"),
        ("copy", f"{size(profile.ceilings.bytes_per_second)}/s"),
    ]
    if profile.trust is not None:
        load = NONE if profile.trust.load_average is None else f"{profile.trust.load_average:.2f}"
        rows += [
            ("load average before, cores", f"{load}, {profile.trust.cores}"),
            ("calibration before, after", f"{spread(profile.trust.calibration_before)}, {spread(profile.trust.calibration_after)}"),
        ]  # fmt: skip
    return PlainTable("Machine, measured in this run", ("", "value"), rows)


def spread(times: Spread) -> str:
    """Median and, in brackets, the range from the 20th to the 80th percentile."""
    if times.repeats == 1:
        return duration(times.median)
    factor, unit = time_unit(times.median)
    low, high = (digits(value / factor) for value in (times.p20, times.p80))
    return f"{digits(times.median / factor)} ({low} – {high}) {unit}"


def _layer(layer: Layer, timed: bool) -> tuple[str, ...]:
    cost, base = layer.cost, layer.base or Cost()
    cells = [
        "\u2003" * layer.depth + layer.name, count(cost.parameters), count(cost.trainable), count(cost.flops_forward),
        _plus_count(cost.flops_forward - base.flops_forward), count(cost.flops_backward), f"{cost.operations_forward:,}",
        f"{cost.operations_forward - base.operations_forward:+,}", f"{cost.operations_backward or cost.operations_optimizer:,}",
        f"{cost.waits:,}", _plus_size(cost.bytes_saved - base.bytes_saved), _plus_size(cost.bytes_peak - base.bytes_peak),
    ]  # fmt: skip
    if timed:
        before = base.seconds_forward.median if base.seconds_forward else 0.0
        after = cost.seconds_backward or cost.seconds_optimizer
        cells += [
            NONE if cost.seconds_forward is None else spread(cost.seconds_forward),
            NONE if cost.seconds_forward is None else _plus(cost.seconds_forward.median - before),
            NONE if after is None else spread(after),
        ]
    return tuple(cells)


def _counts(base: float, adapted: float, percent: bool = False) -> tuple[str, str, str]:
    change = f" ({adapted / base - 1:+.2%})" if percent and base else ""
    return count(base), count(adapted), _plus_count(adapted - base) + change


def _whole(base: int, adapted: int) -> tuple[str, str, str]:
    return f"{base:,}", f"{adapted:,}", f"{adapted - base:+,}"


def _sizes(base: int, adapted: int) -> tuple[str, str, str]:
    return size(base), size(adapted), _plus_size(adapted - base)


def _plus(seconds: float) -> str:
    return ("+" if seconds >= 0 else "−") + duration(abs(seconds))


def _plus_count(number: float) -> str:
    return ("+" if number >= 0 else "−") + count(abs(number))


def _plus_size(number: float) -> str:
    return _plus_count(number) + "B"


def _error(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"

"""A record and its changes as tables of text."""

from __future__ import annotations

from cl_methods.bench.record import Record
from cl_methods.bench.rows import OURS, Row, over_ours
from cl_methods.evaluation.tables import ABSENT, TextTable

COLUMNS = {
    "operations": "operations",
    "flops": "FLOPs",
    "saved_bytes": "saved",
    "live_bytes": "alive at once",
    "synchronisations": "waits",
    "text_calls": "text calls",
    "text_flops": "text FLOPs",
    "image_flops": "image FLOPs",
    "seconds": "time",
    "peak_bytes": "peak memory",
}
"""Costs in the order in which they are shown, and their headings."""


def record_table(record: Record) -> TextTable:
    """One line per row; beside a peer's costs stands how many times ours that is."""
    shown = [name for name in COLUMNS if any(row.value(name) is not None for row in record.rows)]
    ratios = over_ours(record.rows)
    lines, breaks, cases = [], [], set()
    for number, row in enumerate(record.rows):
        first = row.case not in cases
        if first and number and len([other for other in record.rows if other.case == row.case]) > 1:
            breaks.append(number)
        cases.add(row.case)
        beside = ratios.get((row.case, row.implementation), {})
        cells = [f"{shown_value(name, row.value(name))}{_times(beside.get(name))}" for name in shown]
        lines.append([_label(row, first), *cells])
    setting = ", ".join(f"{name} {value}" for name, value in record.setting.items())
    return TextTable(f"{record.suite} ({setting})", ["case", *(COLUMNS[name] for name in shown)], lines, breaks)


def shown_value(name: str, value: float | None) -> str:
    """A cost with its unit."""
    if value is None:
        return ABSENT
    if name == "seconds":
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
    if name in ("operations", "synchronisations", "text_calls"):
        return f"{value:,.0f}"
    if name in ("saved_bytes", "live_bytes", "peak_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e6:.4g} M"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f}x)"


def _label(row: Row, first: bool) -> str:
    if row.implementation == OURS:
        return row.case
    return f"{row.case}: {row.implementation}" if first else f"   {row.implementation}"

"""Records one after the other in a file of JSON lines, and what became worse from one to the next."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cl_methods.bench.record import CHECKOUT, Record
from cl_methods.bench.rows import EXACT, OURS, Row

SMALLEST = {"seconds": 0.05, "peak_bytes": 0.1}
"""Relative changes of what is measured that count as none, however quiet the machine."""


class HistoryError(ValueError):
    """A history cannot be read, or holds nothing to compare."""


@dataclass(frozen=True)
class Change:
    """One cost of one case that is not what it was.

    Attributes:
        case: of the suite.
        cost: its name.
        before, now: the values; times and memory relative to the peer of the same run where ``against`` names one.
        noise: the relative change up to which it would not have been reported; 0 for counts.
        against: the peer; "" for absolute values.
    """

    case: str
    cost: str
    before: float
    now: float
    noise: float = 0.0
    against: str = ""

    @property
    def relative(self) -> float:
        """``now / before − 1``; positive is worse."""
        return self.now / self.before - 1 if self.before else float("inf")

    @property
    def worse(self) -> bool:
        """Whether it costs more than before."""
        return self.now > self.before

    def __str__(self) -> str:
        beside = f" beside {self.against}" if self.against else ""
        if self.noise == 0:
            verb = "rose" if self.worse else "fell"
            amount = f", {self.relative:+.1%}" if self.before else ""
            return (
                f"{self.case}: {self.cost.replace('_', ' ')} {verb} from {self.before:,.0f} to {self.now:,.0f}{amount}"
            )
        verbs = {"seconds": ("slower", "faster"), "peak_bytes": ("larger at the peak", "smaller at the peak")}[
            self.cost
        ]
        return f"{self.case}: {self.relative:+.1%}, {verbs[0] if self.worse else verbs[1]}{beside} (noise {self.noise:.1%})"


def default_history() -> Path:
    """The checkout's own history, or one in the current folder where there is no checkout."""
    folder = CHECKOUT / "benchmarks" / "results"
    return folder / "history.jsonl" if folder.is_dir() else Path("bench_history.jsonl")


def append(record: Record, path: Path) -> None:
    """Add a record at the end; what is there stays as it is, and the line is complete or absent.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record.as_dict(), separators=(",", ":")) + "\n"
    with path.open("a+b") as file:
        if file.tell() and not _ends_line(file):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read(path: Path) -> list[Record]:
    """All records, oldest first.

    Raises:
        HistoryError: the file does not exist, or one of its lines is not a record.
    """
    if not path.is_file():
        raise HistoryError(f"history: {path} does not exist; `clk bench --suite step --history {path}` starts one")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_dict(json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise HistoryError(
                f"history: line {number} of {path} is not a record ({type(error).__name__}: {error}); remove the line"
            ) from error
    return records


def last_before(records: Sequence[Record], record: Record) -> Record | None:
    """The last record before ``record`` of the same machine, suite and setting."""
    earlier = records[: records.index(record)] if record in records else records
    return next((other for other in reversed(earlier) if other.key == record.key), None)


def changes(before: Record, now: Record) -> list[Change]:
    """Costs of ours that differ between two records of the same key, the worst first.

    Counts are compared exactly. Times are compared beside the peers of the same run, because machines are not equally fast
    every day: ours became slower if its time over the peer's rose by more than the noise beside *every* peer, and the smallest
    rise is reported. Where a case has no peer, its own times are compared, and so is memory always. The noise of a
    comparison is the sum of the spreads (median over best, minus 1) of all samples that enter it, and at least 5 % of a time
    and 10 % of memory.

    Raises:
        HistoryError: the records are not comparable.
    """
    if before.key != now.key:
        raise HistoryError(f"records of {before.key} and {now.key} are not comparable")
    found: list[Change] = []
    old, new = _cases(before.rows), _cases(now.rows)
    for case in new.keys() & old.keys():
        if OURS not in old[case] or OURS not in new[case]:
            continue
        mine, was = new[case][OURS], old[case][OURS]
        for cost in EXACT:
            if cost in mine.exact and cost in was.exact and mine.exact[cost] != was.exact[cost]:
                found.append(Change(case, cost, was.exact[cost], mine.exact[cost]))
        for cost in SMALLEST:
            change = _measured(case, cost, old[case], new[case])
            if change is not None:
                found.append(change)
    return sorted(found, key=lambda change: (-change.relative, change.case))


def _cases(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.implementation] = row
    return found


def _measured(case: str, cost: str, old: dict[str, Row], new: dict[str, Row]) -> Change | None:
    """The change of a measured cost beside the peer that shows it least, or None if one of them shows none."""
    if cost not in new[OURS].measured or cost not in old[OURS].measured:
        return None
    both = [name for name in new.keys() & old.keys() if name != OURS]
    peers = [name for name in both if cost in new[name].measured and cost in old[name].measured]
    if cost == "peak_bytes" or not peers:
        peers = [""]
    found = [_beside(case, cost, old, new, peer) for peer in sorted(peers)]
    if all(change.relative > change.noise for change in found) or all(
        change.relative < -change.noise for change in found
    ):
        return min(found, key=lambda change: abs(change.relative))
    return None


def _beside(case: str, cost: str, old: dict[str, Row], new: dict[str, Row], peer: str) -> Change:
    values, noise = [], 0.0
    for rows in (old, new):
        mine = rows[OURS].measured[cost]
        value = mine.best
        noise += mine.spread
        if peer:
            theirs = rows[peer].measured[cost]
            value, noise = value / theirs.best, noise + theirs.spread
        values.append(value)
    return Change(case, cost, values[0], values[1], max(noise, SMALLEST[cost]), peer)

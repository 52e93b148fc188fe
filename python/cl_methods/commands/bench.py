"""``clk bench``: how much training steps, evaluations and kernels cost, beside their peers and over time."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from cl_methods.bench import history, suites
from cl_methods.bench.page import write_page
from cl_methods.bench.record import Record, new_record
from cl_methods.bench.tables import record_table
from cl_methods.training.checkpoints.atomic import write_atomically
from cl_methods.training.environment import choose_device

DESCRIPTION = """Measure a suite beside its peers, and keep a history.

kernels      every kernel beside plain PyTorch and what else does the same (the benchmarks of a checkout)
step         whole training steps of every method; ZSCL and MoE-Adapters beside their public procedures
evaluation   FLOPs of one whole MTIL evaluation beside the public procedures
counts       exact counts of every method's step on `mini`, without a clock

No speed is reported of anything that does not compute what it should. Ratios in brackets are a peer's costs over ours.

examples:
  clk bench --suite step --output step.json
  clk bench --suite step --model ViT-B-16 --threads 2 --output vit.json
  clk bench --compare                                  what changed between this machine's last two records
  clk bench --page history.html                        draw the history"""

Suite = Literal["kernels", "step", "evaluation", "counts"]
_WIDTH = 160


@dataclass
class Bench:
    """What to measure, compare or draw.

    Attributes:
        suite: what to measure.
        output: JSON file for the record; an earlier one there is replaced.
        model: `mini` or an open_clip name; suite evaluation takes ViT-B-16 for `mini`.
        methods: names separated by commas; all trained ones when empty. Suite step.
        batch: images per timed step of an open_clip model.
        captions: captions of its timed ZSCL step; as many per image as published when not given.
        rounds: timed rounds.
        time: no-time counts only.
        device: of suite step: `cpu`, `cuda`, `cuda:1` …; `auto` takes a GPU if there is one.
        threads: of torch; its own choice when not given.
        filter: run only benchmarks whose names match, as pytest's -k. Suite kernels.
        history: file of JSON lines to which the record is appended, and which is compared and drawn; the checkout's own, or
            bench_history.jsonl, when not given.
        record: no-record leaves the history alone.
        compare: say what changed since the last record of this machine; the exit status is 1 if something became worse.
        page: draw the history into this HTML file, and a PNG beside it.
    """

    suite: Suite | None = None
    output: Path | None = None
    model: str = "mini"
    methods: str = ""
    batch: int = 4
    captions: int | None = None
    rounds: int = 5
    time: bool = True
    device: str = "auto"
    threads: int | None = None
    filter: str = ""
    history: Path | None = None
    record: bool = True
    compare: bool = False
    page: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Measure, append, compare and draw, as asked.

    Returns:
        0, or 1 if a comparison found something that became worse.

    Raises:
        ValueError: nothing to do, or an option is wrong.
        OSError: a file cannot be written.
    """
    options = tyro.cli(Bench, args=list(arguments), prog="clk bench", description=DESCRIPTION)
    _check(options)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    place = options.history or history.default_history()
    records = history.read(place) if place.is_file() or options.suite is None else []
    status = 0
    if options.suite is not None:
        record = _measure(options, console)
        if options.output is not None:
            write_atomically(options.output, json.dumps(record.as_dict(), indent=1) + "\n")
        _print(record, console)
        if options.compare:
            status = _compare([*records, record], [record], console)
        if options.record:
            history.append(record, place)
            records.append(record)
            console.print(f"appended to {place}", soft_wrap=True)
    elif options.compare:
        machine = new_record("", {}, [], torch.device("cuda" if torch.cuda.is_available() else "cpu")).machine
        latest = {record.key: record for record in records if record.machine == machine}
        if not latest:
            others = ", ".join(sorted({record.machine for record in records})) or "nothing"
            raise history.HistoryError(f"history: {place} holds no record of this machine, {machine}, only of {others}")
        status = _compare(records, list(latest.values()), console)
    if options.page is not None:
        pictures = write_page(records, options.page)
        console.print(f"drawn into {options.page} and {len(pictures)} PNG files beside it", soft_wrap=True)
    return status


def _check(options: Bench) -> None:
    """Everything that can be wrong before work starts.

    Raises:
        ValueError: nothing to do, or an option is wrong.
    """
    if options.suite is None and not options.compare and options.page is None:
        raise ValueError("suite: expected kernels, step, evaluation or counts; or --compare, or --page FILE")
    for name in ("batch", "rounds", "threads", "captions"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    for name in ("output", "page"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name}: expected a file in an existing folder, got {path}")


def _measure(options: Bench, console: Console) -> Record:
    assert options.suite is not None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen = tuple(name.strip() for name in options.methods.split(",") if name.strip())
    with console.status(f"suite {options.suite}") as status:
        setting, rows, device = suites.run(
            options.suite,
            model=options.model,
            methods=chosen,
            batch=options.batch,
            captions=options.captions,
            rounds=options.rounds,
            time=options.time,
            device=choose_device(options.device),
            pattern=options.filter,
            note=status.update,
        )
    return new_record(options.suite, setting, rows, device)


def _print(record: Record, console: Console) -> None:
    table = record_table(record)
    console.print(table.title, style="bold")
    console.print(table.rich())
    console.print(f"{record.machine}; torch {record.versions['torch']}", soft_wrap=True)
    for row in record.rows:
        if row.checked:
            errors = ", ".join(f"{name} {error:.1e}" for name, error in row.checked.items())
            console.print(f"checked: {row.case}: {errors}", soft_wrap=True)


def _compare(records: list[Record], latest: list[Record], console: Console) -> int:
    """Print the changes of each of ``latest`` since the record before it; 1 if something became worse."""
    worse = False
    for record in latest:
        _, suite, setting = record.key
        before = history.last_before(records, record)
        if before is None:
            console.print(f"{suite} ({setting}): nothing to compare with, this is the first record", soft_wrap=True)
            continue
        found = history.changes(before, record)
        commits = f"{before.commit[:10] or 'no commit'} of {before.date[:16]}"
        console.print(f"{suite} ({setting}), since {commits}:", style="bold", soft_wrap=True)
        for name in sorted(before.versions.keys() & record.versions.keys()):
            if before.versions[name] != record.versions[name]:
                console.print(
                    f"  note: {name} was {before.versions[name]}, now {record.versions[name]}", soft_wrap=True
                )
        for change in found:
            console.print(f"  {'worse' if change.worse else 'better'}: {change}", soft_wrap=True)
        if not found:
            console.print("  nothing changed beyond its noise")
        worse = worse or any(change.worse for change in found)
    return int(worse)

"""A recorded step as a trace that Perfetto and chrome://tracing open: ranges of modules, operations, live memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from cl_kernels.profile.attribution import Stack
from cl_kernels.profile.recorder import Operation, StepRecord

_STEP = 1e-6  # seconds that an operation gets where none were measured


def chrome_trace(records: Mapping[str, StepRecord]) -> dict[str, Any]:
    """The records as processes of one trace, in the JSON of the Trace Event Format; times in microseconds.

    Each process has a track with the nested ranges of phases and modules and the operations in them, with their FLOPs, bytes
    and shapes, and a counter of live bytes. Ranges of the backward pass are those of what it differentiates. Where nothing was
    timed every operation lasts one microsecond.

    Args:
        records: by the name of the process.
    """
    events: list[dict[str, Any]] = []
    for number, (name, record) in enumerate(records.items(), start=1):
        untimed = "" if record.timed else " (one microsecond per operation: nothing was timed)"
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name + untimed}})
        spans = _spans(record)
        events += _ranges(record, spans, number)
        for operation, (start, end) in zip(record.operations, spans, strict=True):
            arguments = {
                "flops": operation.flops, "bytes": operation.bytes, "shapes": str(list(map(list, operation.shapes))),
                "waits": operation.waits, "module": operation.stack[-1] if operation.stack else "",
            }  # fmt: skip
            events.append(_range(operation.name, operation.phase, start, end, number) | {"args": arguments})
            events.append(
                {"ph": "C", "name": "live bytes", "pid": number, "ts": 1e6 * end, "args": {"bytes": operation.live}}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _spans(record: StepRecord) -> list[tuple[float, float]]:
    """(start, end) of each operation, in seconds."""
    if not record.timed:
        return [(place * _STEP, (place + 1) * _STEP) for place in range(len(record.operations))]
    found, before = [], 0.0
    for operation in record.operations:
        start = max(operation.start, before)  # a GPU's operations end later than the host went on
        before = start + operation.seconds
        found.append((start, before))
    return found


def _ranges(record: StepRecord, spans: list[tuple[float, float]], process: int) -> list[dict[str, Any]]:
    """Nested ranges around neighbouring operations of the same phase, and of the same modules at each depth."""
    found: list[dict[str, Any]] = []
    placed = list(zip(record.operations, spans, strict=True))
    for phase, group in groupby(placed, key=lambda entry: entry[0].phase):
        inside = list(group)
        found.append(_range(phase, phase, inside[0][1][0], inside[-1][1][1], process))
        found += _nested(inside, 0, process)
    return found


def _nested(inside: list[tuple[Operation, tuple[float, float]]], depth: int, process: int) -> list[dict[str, Any]]:
    found = []

    def caller(entry: tuple[Operation, tuple[float, float]]) -> Stack:
        return entry[0].stack[depth : depth + 1]

    for name, group in groupby(inside, key=caller):
        if not name:
            continue
        part = list(group)
        found.append(_range(name[0], part[0][0].phase, part[0][1][0], part[-1][1][1], process))
        found += _nested(part, depth + 1, process)
    return found


def _range(name: str, phase: str, start: float, end: float, process: int) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": phase, "pid": process, "tid": 1, "ts": 1e6 * start, "dur": 1e6 * (end - start),
    }  # fmt: skip

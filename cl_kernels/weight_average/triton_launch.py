"""Launches the Triton kernel of weight averaging: the tables of addresses, kept with the plan, and one launch for each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cl_kernels.weight_average.plan import Plan
from cl_kernels.weight_average.reference import ELEMENTS_PER_COUNTER
from cl_kernels.weight_average.triton_kernels import CHUNK, average_kernel, block_of

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNMENT = 16


@dataclass(frozen=True)
class _Table:
    rows: Tensor  # (programs, 5) int64, on the tensors' device
    options: dict[str, Any]  # the kernel's constants
    half: bool  # whether the averages are stored in 16 bits


_captured: list[list[_Table]] = []
"""Tables that CUDA graphs read by address. Nobody says when a graph goes, so they stay: plans are forgotten, replays are not."""


def average_(
    plan: Plan,
    averages: list[Tensor],
    values: list[Tensor],
    weight: float,
    others: list[Tensor],
    other_weight: float,
    seed: int | None,
) -> None:
    """See :func:`cl_kernels.blend_`. One launch per combination of dtypes, and one more for tensors off 16-byte addresses.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the tensors were never averaged before.
    """
    capturing = bool(averages) and _capturing(averages[0])
    if plan.tables is None:
        if capturing:
            raise RuntimeError(
                "average_: these tensors are averaged for the first time while a CUDA graph is captured, and the table of their "
                "addresses cannot be copied to the device then; call average_ on them once before the capture"
            )
        plan.tables = _tables([averages, values, others] if others else [averages, values])
    if capturing and not any(tables is plan.tables for tables in _captured):
        _captured.append(plan.tables)
    for table in plan.tables:
        if table.rows.is_cuda and not capturing:
            table.rows.record_stream(
                torch.cuda.current_stream(table.rows.device)
            )  # a plan may go before its launch is done
        stochastic = seed is not None and table.half
        with torch.cuda.device_of(table.rows):
            average_kernel[(len(table.rows),)](
                table.rows,
                weight,
                other_weight,
                seed or 0,
                STOCHASTIC=stochastic,
                BLOCK=block_of(stochastic),
                **table.options,
            )


def _capturing(tensor: Tensor) -> bool:
    """Whether what is launched on the device of ``tensor`` becomes part of a CUDA graph instead of running."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _tables(lists: list[list[Tensor]]) -> list[_Table]:
    """Rows of tensors that share their dtypes and alignment, each tensor cut into chunks of ``CHUNK`` elements."""
    groups: defaultdict[tuple, list[list[int]]] = defaultdict(list)
    counter = 0
    for row in zip(*lists, strict=True):
        n = row[0].numel()
        if n:
            addresses = [tensor.data_ptr() for tensor in row]
            aligned = all(address % _ALIGNMENT == 0 for address in addresses)
            entry = [*addresses, *([0] * (3 - len(row))), n, counter]
            groups[tuple(tensor.dtype for tensor in row), aligned].append(entry)
        counter += (n + ELEMENTS_PER_COUNTER - 1) // ELEMENTS_PER_COUNTER
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    return [
        _Table(_cut(entries, dtypes).to(device), _options(dtypes, aligned), dtypes[0].itemsize == 2)
        for (dtypes, aligned), entries in groups.items()
    ]


def _cut(entries: list[list[int]], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    whole = torch.tensor(entries, dtype=torch.int64)  # (tensors, 5)
    programs = (whole[:, 3] + CHUNK - 1) // CHUNK
    source = torch.repeat_interleave(torch.arange(len(whole)), programs)
    first = (programs.cumsum(0) - programs)[source]  # each tensor's first program
    start = (torch.arange(len(source)) - first) * CHUNK
    rows = whole[source]
    for column, dtype in enumerate(dtypes):
        rows[:, column] += start * dtype.itemsize
    rows[:, 3] = (rows[:, 3] - start).clamp(max=CHUNK)
    rows[:, 4] += start // ELEMENTS_PER_COUNTER
    return rows


def _options(dtypes: tuple[torch.dtype, ...], aligned: bool) -> dict[str, Any]:
    return {
        "DST": _TYPES[dtypes[0]],
        "SRC": _TYPES[dtypes[1]],
        "OTHER": _TYPES[dtypes[2]] if len(dtypes) == 3 else None,
        "COMPUTE": tl.float64 if dtypes[0] == torch.float64 else tl.float32,
        "ALIGNED": aligned,
    }

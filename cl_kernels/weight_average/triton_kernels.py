"""Weight averaging in Triton: one launch for all tensors of one pair of dtypes, through a table of addresses."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
CHUNK = 8 * BLOCK
"""Elements of one program: 16 fp32 elements a thread and pass, and a table of 110 KB for the 150 million weights of ViT-B/16."""

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TABLES_KEPT = 8
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
"""The tables of the last lists of tensors: a training run averages the same ones again and again, and then copies nothing."""


@triton.jit
def average_kernel(
    table_ptr,  # [programs, 3] int64: address of the average, address of the value, number of elements
    weight: tl.float64,
    DST: tl.constexpr,
    SRC: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of the table per program. Full blocks are read without a mask, 16 bytes at a time where addresses allow it."""
    row = table_ptr + tl.program_id(0) * 3
    dst = tl.load(row).to(tl.pointer_type(DST))  # [n]
    src = tl.load(row + 1).to(tl.pointer_type(SRC))  # [n]
    n = tl.load(row + 2).to(tl.int32)
    if ALIGNED:
        dst = tl.multiple_of(dst, 16)
        src = tl.multiple_of(src, 16)
    share = (tl.zeros((), tl.float64) + weight).to(COMPUTE)
    full = n // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        offset = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)  # [BLOCK]
        a = tl.load(dst + offset).to(COMPUTE)
        v = tl.load(src + offset).to(COMPUTE)
        tl.store(dst + offset, (a + share * (v - a)).to(DST))
    if full < n:
        offset = full + tl.arange(0, BLOCK)
        inside = offset < n
        a = tl.load(dst + offset, mask=inside).to(COMPUTE)
        v = tl.load(src + offset, mask=inside).to(COMPUTE)
        tl.store(dst + offset, (a + share * (v - a)).to(DST), mask=inside)


def _table(averages: list[Tensor], values: list[Tensor]) -> Tensor:
    """(programs, 3) int64 on the tensors' device: every tensor cut into chunks of ``CHUNK`` elements."""
    key = (
        averages[0].device,
        *((a.data_ptr(), v.data_ptr(), a.numel()) for a, v in zip(averages, values, strict=True)),
    )
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    whole = torch.tensor(key[1:], dtype=torch.int64)  # (tensors, 3)
    programs = (whole[:, 2] + CHUNK - 1) // CHUNK
    rows = torch.repeat_interleave(torch.arange(len(whole)), programs)
    start = (torch.arange(len(rows)) - (programs.cumsum(0) - programs)[rows]) * CHUNK  # first element of each program
    sizes = torch.tensor([[a.element_size(), v.element_size()] for a, v in zip(averages, values, strict=True)])
    table = torch.cat(
        [whole[rows, :2] + start[:, None] * sizes[rows], (whole[rows, 2] - start).clamp(max=CHUNK)[:, None]], 1
    )
    _tables[key] = table.to(averages[0].device)
    if len(_tables) > _TABLES_KEPT:
        _tables.popitem(last=False)
    return _tables[key]


def average_(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """See :func:`cl_kernels.average_`. One launch per pair of dtypes, and one more for tensors off 16-byte addresses."""
    groups: defaultdict[tuple, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for a, v in zip(averages, values, strict=True):
        if a.numel():
            aligned = a.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0
            group = groups[a.dtype, v.dtype, aligned]
            group[0].append(a)
            group[1].append(v)
    for (dst, src, aligned), (group_averages, group_values) in groups.items():
        table = _table(group_averages, group_values)
        with torch.cuda.device_of(table):
            average_kernel[(len(table),)](
                table,
                weight,
                DST=_TYPES[dst],
                SRC=_TYPES[src],
                COMPUTE=tl.float64 if dst == torch.float64 else tl.float32,
                ALIGNED=aligned,
                BLOCK=BLOCK,
            )

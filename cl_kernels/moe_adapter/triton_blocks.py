"""Tile sizes and launch options of the adapters' Triton kernels: functions of shapes, dtype and shared memory alone.

How the row tiles were chosen, counted for B = 64, L = 197, D = 768, k · R = 128 in bf16 on an H100 (132 processors, each fed by the
L2 cache with 64 bytes a cycle, 4096 FLOP a cycle): every tile reads both weights of its experts, 393 kB. A tile of 32 rows has to
bring in 7.3 k cycles' worth of bytes for 3 k cycles of products (6 k, as wgmma needs 64 rows), one of 64 rows 8.4 k for 6.1 k, one
of 128 rows 10.7 k for 12.3 k. A sample takes 7, 4 or 2 of them, so 51 k, 34 k or 25 k cycles, although 32-row tiles waste 12 % of
their rows and the others 23 %. With 128 rows there are 128 programs: one a processor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 processors of an H100. A constant: the same shapes give the same bits."""

SMALL_SHARED_MEMORY = 64 * 1024
"""What every target has (bytes of shared memory that one program may use); assumed where the device does not tell."""


LARGE_SHARED_MEMORY = 160 * 1024
"""What data-centre GPUs from the A100 on have."""


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch options of one call's row kernels."""

    rows: int
    columns: int  # of the bottleneck of all slots
    width: int  # of D
    padded_rank: int
    chunks: int  # of columns
    num_warps: int
    num_stages: int
    out_stages: int  # of the loop over D that writes, which has more to load in a step


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on ``device``."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALL_SHARED_MEMORY)


@functools.lru_cache(maxsize=1024)
def blocks_for(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    rank: int,
    slots: int,
    experts: int,
    gathered: bool,
    shared: int = SMALL_SHARED_MEMORY,
) -> Blocks:
    """The forward and input-gradient tiles for x of ``shape`` (B, L, D): nothing spills, and shared memory fits (tests/aot)."""
    batch, length, width = shape
    half = dtype != torch.float32
    padded_rank = max(16, triton.next_power_of_2(rank))
    # A launch covers one slot of gathered rows, all slots otherwise.
    total = padded_rank * (1 if gathered else slots)
    columns = min(triton.next_power_of_2(total), 128 if total <= 128 else 64 if half else 32)
    chunks = triton.cdiv(total, columns)
    if not half:
        # Products without tensor cores keep their factors in registers, too.
        rows = max(16, min(32, triton.next_power_of_2(batch * length if gathered else length)))
        warps = 8 if rows * columns > 2048 and shared > SMALL_SHARED_MEMORY else 4
        step = 16 if chunks == 1 else 32
        return Blocks(rows, columns, _width(width, step), padded_rank, chunks, warps, num_stages=2, out_stages=2)
    rows = _gathered_rows(batch * length, experts) if gathered else _sample_rows(batch, length)
    rows = rows if shared > SMALL_SHARED_MEMORY else min(64, rows)
    warps = 8 if rows * columns > 4096 else 4
    step = 64 if chunks == 1 or shared >= LARGE_SHARED_MEMORY else 32
    return Blocks(rows, columns, _width(width, step), padded_rank, chunks, warps, *_stages(shared))


def _stages(shared: int) -> tuple[int, int]:
    """Tiles on their way at once: with one program on a processor nothing else hides what memory takes to answer."""
    if shared >= LARGE_SHARED_MEMORY:
        return 4, 4
    return (3, 2) if shared > SMALL_SHARED_MEMORY else (2, 2)


def _width(width: int, step: int) -> int:
    return max(16, min(step, triton.next_power_of_2(width)))


def _sample_rows(batch: int, length: int) -> int:
    """128 rows where that saves a third of the tiles, which take half as long again, and most processors get a program; else 64."""
    wide = triton.cdiv(length, 128)
    if wide * 3 <= triton.cdiv(length, 64) * 2 and batch * wide >= PROGRAMS // 3:
        return 128
    return max(16, min(64, triton.next_power_of_2(length)))


def _gathered_rows(rows: int, experts: int) -> int:
    """128 rows where the one unfinished tile of each expert is a small part of its rows; else 64."""
    return 128 if rows >= 512 * experts else 64


def expert_blocks(dtype: torch.dtype, width: int, rank: int, shared: int = SMALL_SHARED_MEMORY) -> dict[str, int]:
    """Block sizes and launch options of the expert gradients."""
    half = dtype != torch.float32
    return {
        "BLOCK_ROWS": 64 if half else 32,
        "BLOCK_R": max(16, min(64, triton.next_power_of_2(rank))),
        "BLOCK_D": _width(width, 128 if half else 32),
        "num_warps": 8,
        "num_stages": 3 if half and shared >= LARGE_SHARED_MEMORY else 2,
    }


def chunk_rows(rows: int, blocks: int, block_rows: int) -> int:
    """Rows of an expert that one program sums, of ``rows`` in all slots together, for each of ``blocks`` of the weights.

    One expert alone makes about ``PROGRAMS`` programs; many share that number and add at most one for each of them and each block.
    Only sums of experts with several chunks are kept: fewer than two for each ``chunk_rows`` rows, so that their memory has a bound
    that grows neither with the rows nor with the experts, 35 MB at R = 64, D = 768.
    """
    wanted = triton.cdiv(rows * blocks, PROGRAMS)
    return max(4 * block_rows, triton.cdiv(wanted, block_rows) * block_rows)

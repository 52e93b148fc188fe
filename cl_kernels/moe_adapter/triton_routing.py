"""Samples sorted by expert, on the device and without waiting for it: a stable sort for every slot, in one launch or two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 16384
"""Samples that one program places. A program reads them all to find its own, so that no (samples, experts) table is needed."""


@triton.jit
def _bucket(ids_ptr, sample, end, E, K: tl.constexpr):
    """Expert of each sample in this program's slot; E where the id is out of range, E + 1 for samples from ``end`` on."""
    expert = tl.load(ids_ptr + sample.to(tl.int64) * K + tl.program_id(1), mask=sample < end, other=-1)
    return tl.where(sample < end, tl.where((expert >= 0) & (expert < E), expert, E), E + 1).to(tl.int32)


@triton.jit(do_not_specialize=["B", "E", "segments"])
def count_kernel(
    ids_ptr,  # [B, K]
    count_ptr,  # [K, E + 1, segments]
    B,
    E,
    segments,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many samples of one segment chose one expert."""
    mine = tl.program_id(0)
    first = tl.program_id(2) * SEGMENT
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, min(first + SEGMENT, B), BLOCK):
        found += (_bucket(ids_ptr, start + tl.arange(0, BLOCK), B, E, K) == mine).to(tl.int32)
    where = (tl.program_id(1) * (E + 1) + mine) * segments + tl.program_id(2)
    tl.store(count_ptr + where, tl.sum(found, 0))


@triton.jit(do_not_specialize=["B", "E", "segments"])
def order_kernel(
    ids_ptr,  # [B, K]
    count_ptr,  # [K, E + 1, segments], or None where one segment holds all samples
    order_ptr,  # [K, B]: samples by expert, in their order
    offset_ptr,  # [K, E + 2]: where each expert's samples begin; those without an expert come last
    B,
    E,
    segments,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Places one expert's samples of one segment behind those of lower experts and of earlier segments."""
    mine = tl.program_id(0)
    first = tl.program_id(2) * SEGMENT
    end = min(first + SEGMENT, B)
    before = tl.zeros((BLOCK,), tl.int32)
    if count_ptr is None:
        for start in range(0, B, BLOCK):
            before += (_bucket(ids_ptr, start + tl.arange(0, BLOCK), B, E, K) < mine).to(tl.int32)
    else:
        # In memory the counts of a slot lie in the order in which its samples are placed.
        stop = mine * segments + tl.program_id(2)
        for start in range(0, stop, BLOCK):
            i = start + tl.arange(0, BLOCK)
            before += tl.load(count_ptr + tl.program_id(1) * (E + 1) * segments + i, mask=i < stop, other=0)
    begin = tl.sum(before, 0)
    if tl.program_id(2) == 0:
        tl.store(offset_ptr + tl.program_id(1) * (E + 2) + mine, begin)
        if mine == E:
            tl.store(offset_ptr + tl.program_id(1) * (E + 2) + E + 1, B)
    order_ptr += tl.program_id(1).to(tl.int64) * B
    for start in range(first, end, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        chosen = _bucket(ids_ptr, sample, end, E, K) == mine
        place = begin + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(order_ptr + place, sample, mask=chosen)
        begin += tl.sum(chosen.to(tl.int32), 0)


def block_of(samples: int) -> int:
    """Samples that a program looks at together."""
    return max(32, min(2048, triton.next_power_of_2(samples)))


def route(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """``order`` (k, B) int32, samples by expert for every slot, and ``offset`` (k, E + 2) int32, where each expert's begin."""
    samples, slots = expert_ids.shape
    segments = max(1, triton.cdiv(samples, SEGMENT))
    order = expert_ids.new_empty((slots, samples), dtype=torch.int32)
    offset = expert_ids.new_empty((slots, experts + 2), dtype=torch.int32)
    grid, constants = (experts + 1, slots, segments), {"K": slots, "SEGMENT": SEGMENT, "BLOCK": block_of(samples)}
    counts = None
    if segments > 1:
        counts = expert_ids.new_empty((slots, experts + 1, segments), dtype=torch.int32)
        count_kernel[grid](expert_ids, counts, samples, experts, segments, **constants)
    order_kernel[grid](expert_ids, counts, order, offset, samples, experts, segments, **constants)
    return order, offset

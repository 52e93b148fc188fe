"""Samples sorted by expert, on the device and without waiting for it: a stable counting sort for every slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _bucket(ids_ptr, sample, B, E, K: tl.constexpr):
    """Expert of each sample in this program's slot; E where the id is out of range or the sample is beyond B."""
    expert = tl.load(ids_ptr + sample.to(tl.int64) * K + tl.program_id(1), mask=sample < B, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def count_kernel(
    ids_ptr,  # [B, K]
    count_ptr,  # [K, blocks, EP]
    B,
    E,
    blocks,
    K: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many of a block of samples chose each expert."""
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _bucket(ids_ptr, sample, B, E, K)
    chosen = (expert[:, None] == tl.arange(0, EP)[None, :]) & (sample < B)[:, None]
    where = (tl.program_id(1) * blocks + tl.program_id(0)) * EP + tl.arange(0, EP)
    tl.store(count_ptr + where, tl.sum(chosen.to(tl.int32), 0))


@triton.jit
def order_kernel(
    ids_ptr,  # [B, K]
    count_ptr,  # [K, blocks, EP]
    order_ptr,  # [K, B]: samples by expert, in their order
    offset_ptr,  # [K, E + 2]: where each expert's samples begin; those without an expert come last
    B,
    E,
    blocks,
    K: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COUNTS: tl.constexpr,
):
    """Every block adds up the counts of the blocks before it by itself, and places its samples."""
    bucket = tl.arange(0, EP)
    before = tl.zeros((EP,), tl.int32)
    total = tl.zeros((EP,), tl.int32)
    for start in range(0, blocks, BLOCK_COUNTS):
        block = start + tl.arange(0, BLOCK_COUNTS)
        where = (tl.program_id(1) * blocks + block)[:, None] * EP + bucket[None, :]
        counts = tl.load(count_ptr + where, mask=(block < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((block < tl.program_id(0))[:, None], counts, 0), 0)
    begin = tl.cumsum(total, 0) - total
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _bucket(ids_ptr, sample, B, E, K)
    chosen = ((expert[:, None] == bucket[None, :]) & (sample < B)[:, None]).to(tl.int32)
    place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + (begin + before)[None, :]), 1)
    tl.store(order_ptr + tl.program_id(1) * B + place, sample, mask=sample < B)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr + tl.program_id(1) * (E + 2) + bucket, begin, mask=bucket <= E)
        tl.store(offset_ptr + tl.program_id(1) * (E + 2) + E + 1, B)


def route(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """``order`` (k, B) int32, samples by expert for every slot, and ``offset`` (k, E + 2) int32, where each expert's begin."""
    samples, slots = expert_ids.shape
    padded = triton.next_power_of_2(experts + 1)
    block = max(1, min(128, 8192 // padded, triton.next_power_of_2(max(samples, 1))))
    blocks = triton.cdiv(samples, block)
    counts = expert_ids.new_empty((slots, blocks, padded), dtype=torch.int32)
    order = expert_ids.new_empty((slots, samples), dtype=torch.int32)
    offset = expert_ids.new_empty((slots, experts + 2), dtype=torch.int32)
    grid = (blocks, slots)
    count_kernel[grid](expert_ids, counts, samples, experts, blocks, K=slots, EP=padded, BLOCK=block)
    order_kernel[grid](
        expert_ids,
        counts,
        order,
        offset,
        samples,
        experts,
        blocks,
        K=slots,
        EP=padded,
        BLOCK=block,
        BLOCK_COUNTS=max(1, min(64, 4096 // padded)),
    )
    return order, offset

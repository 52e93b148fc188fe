"""The dropout mask of the adapters, in plain PyTorch: counter-based, so that every backend draws the same bits.

Philox-4x32 with 10 rounds (Salmon et al., SC 2011) gives four words for a counter ``(offset, 0, 0)`` under key ``seed``, as in
Triton's ``tl.rand4x(seed, offset)``. Element r of the bottleneck row ``(b · k + slot) · L + token`` takes word ``r % 4`` of offset
``row · ⌈R / 4⌉ + r // 4``: one evaluation serves four neighbours, and rows share none. A part of a batch that starts at sample s
drops what the whole batch would if its seed comes with s (:func:`seed_of_part`): its rows then count from ``s · k · L``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels import philox

_TO_UNIT = 4.6566127342e-10  # the largest float32 times which 2³¹ − 1 stays below 1

draw_seed = philox.draw_seed


def seed_of_part(seed: Tensor, first_sample: int) -> Tensor:
    """The seed of a part of a batch: int64 (2,), the batch's ``seed`` () and the number in it of the part's first sample."""
    return torch.stack([seed, torch.full_like(seed, first_sample)])


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """``tl.rand4x(seed, offset)``: float32 in [0, 1), (…, 4) for an ``offset`` (…), int64 and non-negative."""
    words = philox.words(seed, offset)
    signed = torch.where(words >= 2**31, 2**32 - 1 - words, words)  # −x − 1 of the word read as int32
    return signed.to(torch.float32) * _TO_UNIT


def keep(seed: Tensor, row: Tensor, rank: int, p: float) -> Tensor:
    """Which elements of the bottleneck rows ``row`` (…, int64) survive dropout with probability ``p``: bool (…, R)."""
    groups = (rank + 3) // 4
    offset = row[..., None] * groups + torch.arange(groups, device=row.device)
    drawn = uniform(seed, offset).flatten(-2)[..., :rank]
    return drawn >= torch.tensor(p, dtype=torch.float32, device=row.device)

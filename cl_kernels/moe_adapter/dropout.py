"""The dropout mask of the adapters, in plain PyTorch: counter-based, so that every backend draws the same bits.

Philox-4x32 with 10 rounds (Salmon et al., SC 2011) gives four words for a counter ``(offset, 0, 0)`` under key ``seed``, as in
Triton's ``tl.rand4x(seed, offset)``. Element r of the bottleneck row ``(b · k + slot) · L + token`` takes word ``r % 4`` of offset
``row · ⌈R / 4⌉ + r // 4``: one evaluation serves four neighbours, and rows share none.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_TO_UNIT = 4.6566127342e-10  # the largest float32 times which 2³¹ − 1 stays below 1


def draw_seed() -> Tensor:
    """A seed from torch's default CPU generator: int64 (), on the CPU, so that no device has to be waited for."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """``tl.rand4x(seed, offset)``: float32 in [0, 1), (…, 4) for an ``offset`` (…), int64 and non-negative."""
    seed = seed.to(offset.device)
    c0, c1, c2, c3 = offset & _LOW, (offset >> 32) & _LOW, torch.zeros_like(offset), torch.zeros_like(offset)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products are 64 bits wide: int64 holds the same bits, and the mask drops what the arithmetic shift fills in.
        second, first = _MULTIPLIERS[1] * c2, _MULTIPLIERS[0] * c0
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    words = torch.stack([c0, c1, c2, c3], -1)
    signed = torch.where(words >= 2**31, _LOW - words, words)  # −x − 1 of the word read as int32
    return signed.to(torch.float32) * _TO_UNIT


def keep(seed: Tensor, row: Tensor, rank: int, p: float) -> Tensor:
    """Which elements of the bottleneck rows ``row`` (…, int64) survive dropout with probability ``p``: bool (…, R)."""
    groups = (rank + 3) // 4
    offset = row[..., None] * groups + torch.arange(groups, device=row.device)
    drawn = uniform(seed, offset).flatten(-2)[..., :rank]
    return drawn >= torch.tensor(p, dtype=torch.float32, device=row.device)

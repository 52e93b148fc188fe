"""Random bits that depend on a seed and a counter alone, in plain PyTorch, so that every backend draws the same ones.

Philox-4x32 with 10 rounds (Salmon et al., SC 2011): four words for a counter ``(offset, 0, 0)`` under key ``seed``, as Triton's
``tl.philox`` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


def draw_seed(device: torch.device | None = None) -> Tensor:
    """A seed from torch's default generator of ``device``, the CPU if None: int64 scalar, on that device.

    No device has to be waited for, and a CUDA graph, which advances its device's generator, draws a new seed in every replay.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu" if device is None else device)


def words(seed: Tensor, offset: Tensor) -> Tensor:
    """The four words of each counter, as int64 in [0, 2³²).

    Args:
        seed: int64 scalar.
        offset: int64, non-negative, any shape.

    Returns:
        int64 in the shape of ``offset`` with a dimension of 4 behind it.
    """
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
    return torch.stack([c0, c1, c2, c3], -1)

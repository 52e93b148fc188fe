"""What the machine at hand reaches at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def ceilings() -> dict[str, float]:
    """``flops`` per second of a large fp32 product, ``bytes`` per second of an in-place lerp of one large tensor."""
    size, length = (8192, 2**28) if DEVICE.type == "cuda" else (1536, 2**25)
    a, b, c = (torch.randn(size, size, device=DEVICE) for _ in range(3))
    x, y = torch.randn(length, device=DEVICE), torch.randn(length, device=DEVICE)
    return {
        "flops": 2 * size**3 / best(lambda: torch.mm(a, b, out=c)),
        "bytes": 12 * length / best(lambda: x.lerp_(y, 0.5)),
    }


def best(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, the first one not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])

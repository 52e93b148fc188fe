"""How long a run takes at least: its counted operations at the speed that matrix products reach on the device."""

from __future__ import annotations

import time

import torch

_SIDE = {"cpu": 512, "cuda": 8192}
_ENOUGH = 0.2


def product_speed(device: torch.device) -> float:
    """FLOP/s of the fastest of several products of two square float32 matrices, measured now in a fraction of a second.

    Args:
        device: where; another than a CPU or a CUDA device counts as a CPU.
    """
    side = _SIDE.get(device.type, _SIDE["cpu"])
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    out = a @ b
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < _ENOUGH:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def readable_duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.4 h`` or ``2.1 days``."""
    for unit, length, least in (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / length:.0f} min" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than a second"

"""How fast one thread is at this moment: products, averages and calls of several sizes, in processor time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDES = (16, 32, 64, 128, 256, 512, 1024)
"""Of square products."""

LENGTHS = (2**10, 2**13, 2**16, 2**19, 2**21, 2**23)
"""Of two tensors of which one becomes the average."""

_SHORTEST = 1e-3
"""Seconds that are measured at once, at least."""


class Yardsticks:
    """Best seconds of each over all calls of :meth:`measure`."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {"products": {}, "averages": {}}
        self._works: list[tuple[str, int, Callable[[], object], int]] = []
        for side in SIDES:
            self._add("products", side, _product(side))
        for length in LENGTHS:
            self._add("averages", length, _average(length))

    def _add(self, kind: str, size: int, work: Callable[[], object]) -> None:
        work()
        start = time.process_time()
        work()
        self._works.append((kind, size, work, 1 + int(_SHORTEST / max(1e-6, time.process_time() - start))))

    def measure(self) -> None:
        """Once more."""
        for kind, size, work, times in self._works:
            start = time.process_time()
            for _ in range(times):
                work()
            taken = (time.process_time() - start) / times
            self.seconds[kind][str(size)] = min(taken, self.seconds[kind].get(str(size), float("inf")))


def _product(side: int) -> Callable[[], object]:
    a, b, c = (torch.randn(side, side) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def _average(length: int) -> Callable[[], object]:
    x, y = torch.randn(length), torch.randn(length)
    return lambda: x.lerp_(y, 0.5)

"""What the machine at hand reaches at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def ceilings() -> dict[str, float]:
    """``flops`` per second of a large fp32 product, ``bytes`` per second of an in-place lerp of one large tensor; on a GPU
    ``bf16_flops`` too.
    """
    size, length = (8192, 2**28) if DEVICE.type == "cuda" else (1536, 2**25)
    a, b, c = (torch.randn(size, size, device=DEVICE) for _ in range(3))
    x, y = torch.randn(length, device=DEVICE), torch.randn(length, device=DEVICE)
    found = {
        "flops": 2 * size**3 / best(lambda: torch.mm(a, b, out=c)),
        "bytes": 12 * length / best(lambda: x.lerp_(y, 0.5)),
    }
    if DEVICE.type == "cuda":
        a, b, c = (t.bfloat16() for t in (a, b, c))
        found["bf16_flops"] = 2 * size**3 / best(lambda: torch.mm(a, b, out=c))
    return found


def replayed(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of ``function`` on the GPU alone: of a replay of its CUDA graph, in which the host launches nothing.

    Of the fastest of some rounds. Inputs that fit the second-level cache are found there, as in any loop over the same ones.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def seconds(replays: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(replays):
            graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / replays

    replays = max(2, min(20, int(0.05 / max(seconds(2), 1e-6))))
    times = [seconds(replays) for _ in range(rounds)]
    del kept
    return min(times)


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

"""Steps on a GPU: that nothing waits for the device, and graphs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whoever waits for the device raises. Kernels must have been compiled before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step`` and its results, after the warm-up on a side stream that captures need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def replayed(graph: torch.cuda.CUDAGraph, tensors: Iterable[Tensor]) -> list[Tensor]:
    """What a replay leaves in the graph's ``tensors`` (any shapes)."""
    graph.replay()
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in tensors]

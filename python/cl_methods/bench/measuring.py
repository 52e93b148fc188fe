"""Times and peak memory of implementations side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from cl_kernels.profile import ExtraMemory
from cl_methods.bench.rows import Samples
from cl_methods.training.memory.live import LiveMemory

Work = Callable[[], object]


def interleaved(work: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, Samples]:
    """Seconds of every function, called in turn ``rounds`` times, so that what disturbs one disturbs all.

    Args:
        work: functions by name; each has been called before, so that nothing is paid for the first time.
        rounds: at least 1.
        device: waited for after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Samples.of(values) for name, values in seconds.items()}


def peak_memory(function: Work, device: torch.device, rounds: int = 1) -> Samples | None:
    """What a call needs at its peak beyond what was there before it; None where the system does not tell.

    Args:
        function: called ``rounds`` times.
        device: whose memory.
        rounds: at least 1.
    """
    found = []
    for _ in range(rounds):
        with ExtraMemory(device) as extra:
            function()
        if extra.bytes is None:
            return None
        found.append(extra.bytes)
    return Samples.of(found)


class _NewMemory(LiveMemory):
    """Leaves out what an operation finds: whatever it is given that was not made by an earlier one was there before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self.leave_out(value)
        return super().__torch_dispatch__(func, types, args, kwargs)


def live_memory(function: Work) -> int:
    """Bytes of the tensors made by a call that are alive together, at the most: what no allocator can do without."""
    with _NewMemory() as memory:
        function()
    return memory.peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

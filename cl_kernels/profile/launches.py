"""Kernel launches of a step on a GPU, as its driver saw them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cl_kernels.profile.timing import wait
from cl_kernels.profile.workload import Workload

LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
)


def count_launches(work: Workload) -> int | None:
    """Kernels that one step of ``work`` launches; None where it does not run on a GPU."""
    if work.device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        work.run()
        wait(work.device)
    return launches_among(found.key_averages())


def launches_among(events: Iterable[Any]) -> int:
    """How many of the profiler's averaged ``events`` (with ``key`` and ``count``) are launches."""
    return sum(event.count for event in events if event.key in LAUNCHES)

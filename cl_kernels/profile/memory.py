"""Peak memory: what torch allocated on a GPU, what is resident in this process on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def start_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of :func:`peak_memory_bytes`, where the system lets it: not what came earlier.

    Args:
        device: whose memory.
    """
    if device.type == "cuda":
        torch.cuda.init()  # a device with a number does not do that by itself, and its allocator would be missing
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(_CLEAR_PEAK, os.W_OK):
        _CLEAR_PEAK.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest amount of memory since :func:`start_peak_memory`: allocated by torch on a GPU, resident in this process on a CPU.

    Args:
        device: whose memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # kilobytes elsewhere


def resident_bytes() -> int:
    """Memory of this process that is resident now, tensors on a GPU not included; 0 where the system does not tell."""
    return _status("VmRSS") if _STATUS.is_file() else 0


class ExtraMemory:
    """What a block of code needs beyond what was there before it: ``with ExtraMemory(device) as extra: …``, ``extra.bytes``.

    On a CPU the memory that the allocator keeps for later is given back first, so that it is not used unseen; results that are
    still alive at the end are part of the figure. Exact on a GPU, to some hundred kilobytes on Linux, and unknown elsewhere.

    Args:
        device: whose memory.

    Attributes:
        bytes: the result; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATUS.is_file():
            _give_back()
            self._before = _status("VmRSS")
        start_peak_memory(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda" or (_STATUS.is_file() and os.access(_CLEAR_PEAK, os.W_OK)):
            self.bytes = max(0, peak_memory_bytes(self.device) - self._before)


def _give_back() -> None:
    """Let glibc return what has been freed; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

"""Shared by all benchmark suites: no speed without a green check, exact counts beside every time.

Run them with ``pytest -c benchmarks/pytest.ini benchmarks``; compare rows of one run only, because machines differ and are noisy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class DispatchCount(TorchDispatchMode):
    """Counts dispatched operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not any(arg.alias_info and not arg.alias_info.is_write for arg in func._schema.arguments)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """``measure(function, expected, floor_bytes=…, flops=…)``: check ``function()`` against ``expected``, count, then time it."""

    def run(function: Callable[[], Any], expected: list[Tensor], *, tolerance: float, **floor: float) -> None:
        results = function()
        for result, wanted in zip(results, expected, strict=True):
            error = (result.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"relative error {error:.1e} is above {tolerance:.0e}: no time is reported"
        with DispatchCount() as count:
            function()
        benchmark.extra_info |= {
            "device": DEVICE,
            "threads": torch.get_num_threads(),
            "dispatched": count.operations,
            **floor,
        }

        def timed() -> None:
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(timed)

    return run

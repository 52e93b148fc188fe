"""Loading files of public codebases, and timing two versions turn about."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load(path: Path, name: str) -> ModuleType:
    """The module at ``path`` in a package of its own, so that its relative imports find its neighbours."""
    package = ModuleType(name)
    package.__path__ = [str(path.parent)]
    sys.modules[name] = package
    spec = importlib.util.spec_from_file_location(f"{name}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def best(
    steps: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each, turn about; by ``time.process_time`` those of the processor, all threads together."""
    found = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            found[name] = min(found[name], clock() - start)
    return found

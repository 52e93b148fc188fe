"""Which tests run where, and memory that betrays whoever reads it before writing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import Forkserver

# Folders of tests are packages where module names repeat (test_cpu.py …); their helpers have names of their own (*_cases.py).
# tiny/ holds no tests, but what those of many folders share: a CLIP of a few thousand weights, tasks for it, training over it.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "tiny"), *sorted({str(path.parent) for path in HERE.glob("*/*_cases.py")})]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run in this process; a skip would look like a test that was meant to run here.

    Triton fixes at import whether kernels are interpreted, so interpreter tests have a process of their own (TRITON_INTERPRET=1),
    and ahead-of-time compilation is impossible in it. Tests in files called test_cpu.py need the compiled library: they fail where
    it is missing, unless CL_KERNELS_NATIVE=0 says that it was left out on purpose.
    """
    for item in items:
        if item.path.name == "test_cpu.py":
            item.add_marker("native")
    missing = {
        "interpreter": not INTERPRETING,
        "aot": INTERPRETING,
        "nvcc": shutil.which("nvcc") is None,
        "gpu": not torch.cuda.is_available(),
        "chromium": shutil.which("chromium") is None,
        "pyarrow": importlib.util.find_spec("pyarrow") is None,
        "torchao": importlib.util.find_spec("torchao") is None,
        "native": os.environ.get("CL_KERNELS_NATIVE") == "0",
    }
    deselected = [item for item in items if any(absent and item.get_closest_marker(m) for m, absent in missing.items())]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("cl_kernels"):
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)

    return allocate_and_fill


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that cl_kernels asks for is full of NaN, and of the smallest integer for integer types."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def forked_torch() -> Iterator[Forkserver]:
    """Runs programs in processes that find torch imported and nothing of ours."""
    server = Forkserver(["torch"])
    yield server
    server.close()


@pytest.fixture(scope="session")
def forked_clk() -> Iterator[Forkserver]:
    """Runs programs in processes that find what ``clk run`` needs imported, on one thread each."""
    server = Forkserver(["cl_methods.commands.run"], OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    yield server
    server.close()

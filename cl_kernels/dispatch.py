"""Which backend runs an operation, and why the others do not.

Order of choice: the ``backend=`` argument, :func:`use_backend`, the environment variable ``CL_KERNELS_BACKEND``, then the first
available one for the tensors' device. Falling back from a kernel to the reference warns once per reason.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cl_kernels import library

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = ("moe_adapter", "top_k_gating", "distill_kl", "feature_distill_kl", "average_")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
AVAILABLE = "available"

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run in the interpreter, on CPU tensors. Fixed at import, as Triton fixes it when a kernel is defined."""

_override: str | None = None
_chosen: dict[tuple[str, str], str] = {}
_warned: set[str] = set()


def _status(operation: str, backend: str) -> str:
    if backend == "reference":
        return AVAILABLE
    if backend == "cpu":
        if library.load_error:
            return library.load_error
        return AVAILABLE if library.has_kernel(library.COMPILED, operation, "CPU") else "not in the compiled library"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not library.has_kernel(library.TRITON, operation, "CUDA"):
            return "no Triton kernel is registered"
        if INTERPRETING or torch.cuda.is_available():
            return AVAILABLE
        return "no CUDA device (TRITON_INTERPRET=1 would run it in the interpreter)"
    if library.load_error:
        return library.load_error
    if not library.has_kernel(library.COMPILED, operation, "CUDA"):
        return (
            library.build_information().get("cuda_reason")
            or "not in the compiled library: its Triton kernel serves CUDA"
        )
    return AVAILABLE if torch.cuda.is_available() else "no CUDA device"


def backends() -> dict[str, dict[str, str]]:
    """For every operation and backend, ``"available"`` or the reason why not.

    Returns:
        ``{operation: {backend: status}}`` with the backends ``reference``, ``cpu``, ``triton`` and ``cuda``. ``triton`` holds for
        every call of an operation but float64 in ``moe_adapter`` and ``feature_distill_kl`` and more than 128 experts (32 in
        float64) in ``top_k_gating``, which run on the reference.
    """
    return {operation: {backend: _status(operation, backend) for backend in BACKENDS} for operation in OPERATIONS}


def autocast_device(device: torch.device) -> str:
    """The kind of device whose autocast holds for tensors there; meta tensors have none and are taken for the CPU's."""
    return "cpu" if device.type == "meta" else device.type


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the block with backend ``name``, as ``backend=name`` would. Holds for the whole process.

    Raises:
        ValueError: ``name`` is not a backend; or, at the call, it cannot run that operation on those tensors.
    """
    global _override
    _check_name(name)
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def choose(operation: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that runs ``operation`` on ``device``.

    Raises:
        ValueError: the backend asked for does not exist, is not available (with the reason), or does not run on that device.
    """
    return _resolve(operation, device.type, backend or _override or os.environ.get("CL_KERNELS_BACKEND"))


def _resolve(operation: str, device: str, wanted: str | None) -> str:
    """torch.compile evaluates this while tracing and guards on its arguments alone."""
    if device == "meta" and wanted in (None, "cpu"):
        return "cpu"  # nothing is computed there, so nothing has to be available: its shapes are registered everywhere
    if wanted is not None:
        return _explicit(operation, device, wanted)
    chosen = _chosen.get((operation, device))
    return chosen if chosen is not None else _automatic(operation, device)


# What torch.compiler.assume_constant_result does, without importing torch._dynamo, which would import Triton.
_resolve.__dict__["_dynamo_marked_constant"] = True


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")


def _explicit(operation: str, device: str, name: str) -> str:
    _check_name(name)
    status = _status(operation, name)
    if status != AVAILABLE:
        raise ValueError(f"backend={name!r} cannot run {operation}: {status}")
    runs_on = {"reference": device, "cpu": "cpu", "triton": "cpu" if INTERPRETING else "cuda", "cuda": "cuda"}[name]
    if device != runs_on:
        raise ValueError(f"backend={name!r} cannot run {operation} on {device} tensors, only on {runs_on} ones")
    return name


def _automatic(operation: str, device: str) -> str:
    preferred = PREFERENCE.get(device, ("reference",))
    chosen = next(name for name in preferred if _status(operation, name) == AVAILABLE)
    reasons = "; ".join(f"{name}: {_status(operation, name)}" for name in preferred[:-1])
    if chosen == "reference" and reasons and reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(
            f"cl_kernels: {operation} runs on its plain PyTorch reference on {device} ({reasons}), as will every operation "
            "for that reason. `python -m cl_kernels.doctor` tells more.",
            RuntimeWarning,
            stacklevel=5,
        )
    _chosen[operation, device] = chosen
    return chosen

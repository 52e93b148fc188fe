"""Defines the operations for torch's dispatcher and loads the compiled library against them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from cl_kernels.schemas import SCHEMAS

COMPILED = "cl_kernels"
TRITON = "cl_kernels_triton"

_PACKAGE = Path(__file__).parent

definitions = {namespace: torch.library.Library(namespace, "DEF") for namespace in (COMPILED, TRITON)}
"""The libraries that own the schemas; implementations, fakes and gradients register through them and live as long as they do."""

for _library in definitions.values():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def build_information() -> dict[str, Any]:
    """What setup.py built, with which tools, or the ``reason`` why nothing."""
    path = _PACKAGE / "_build.json"
    if not path.exists():
        return {
            "native": False,
            "reason": "the package was not built; run `pip install .` (a source tree needs `pip install -e .`)",
        }
    return json.loads(path.read_text())


def _load() -> str:
    """Load the compiled library; returns the reason why it is not there, or an empty string."""
    path = _PACKAGE / "_ops.so"
    if not path.exists():
        return build_information()["reason"] or f"{path.name} is missing from the installed package"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_information().get("torch", "an unknown torch")
        reason = f"{path.name}, built against torch {built}, does not load under torch {torch.__version__}: {error}"
        warnings.warn(f"cl_kernels: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return ""


load_error = _load()
"""Why the compiled library is not loaded; empty when it is."""


def operator(name: str, backend: str) -> OpOverload:
    """The registered operation that ``backend`` ("cpu", "cuda" or "triton") runs."""
    return getattr(getattr(torch.ops, TRITON if backend == "triton" else COMPILED), name).default


def has_kernel(namespace: str, operation: str, key: str) -> bool:
    """Whether ``namespace::operation`` has an implementation for dispatch key ``key`` ("CPU" or "CUDA")."""
    return operation in SCHEMAS and torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{operation}", key)

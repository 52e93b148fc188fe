"""Weights that leave a run as files which others load, from whatever holds them, and what such files have learnt."""

from __future__ import annotations

from cl_methods.training.export.files import NewFolder, load_adapter, write_adapter, write_model
from cl_methods.training.export.learnt import ADAPTER, ADAPTER_CONFIG, FORMAT, Adapter, ExportError, read_adapter

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "FORMAT",
    "Adapter",
    "ExportError",
    "NewFolder",
    "load_adapter",
    "read_adapter",
    "write_adapter",
    "write_model",
]

"""Which methods take optimiser steps, and settings of any method cut down to what a test can afford."""

from __future__ import annotations

import dataclasses
from typing import Any

from cl_methods.methods import METHODS
from cl_methods.training.config import RunConfig

TRAINED = [name for name, method in METHODS.items() if method.trains and not method.closed_form]
SMALL: dict[str, Any] = {"width": 40, "rank": 20, "batch_size": 6, "memory": 12, "fisher_samples": 4, "texts": 20}
SMALL |= {"reference_batch_size": 11}


def shortened(settings: Any) -> Any:
    """Two steps a task, small memories and widths; the detector on the backbone's features instead of AlexNet's."""
    settings = RunConfig("any", settings, limit_iterations=1).effective_settings()
    names = {entry.name for entry in dataclasses.fields(settings)}
    settings = dataclasses.replace(settings, **{name: value for name, value in SMALL.items() if name in names})
    if getattr(settings, "detection", None) == "ddas":
        short = {"features": "backbone", "iterations": 2, "generic_iterations": 2, "augment": False}
        settings = dataclasses.replace(settings, ddas=dataclasses.replace(settings.ddas, **short))
    return settings

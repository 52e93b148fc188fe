"""Checks that dataclasses of settings share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def check_finite(config: Any) -> None:
    """Check that no number of ``config``, alone or in a tuple or mapping, is infinite or NaN.

    A comparison such as ``value < 0`` is false for NaN, and a training run with it only fails steps later.

    Raises:
        ValueError: one is.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in inside):
            raise ValueError(f"{entry.name}: expected finite numbers, got {value}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Check that the named fields of ``config`` are at least ``least``.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name}: expected a number >= {least}, got {getattr(config, name)}")


def check_fraction(config: Any, *names: str) -> None:
    """Check that the named fields of ``config`` lie in [0, 1].

    Raises:
        ValueError: one does not.
    """
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: expected 0 <= value <= 1, got {getattr(config, name)}")


def check_field(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Check that the field ``name`` of ``config`` has one of the allowed values.

    Raises:
        ValueError: it has another.
    """
    assert name in {entry.name for entry in fields(config)}
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(config, name)!r}")

"""Checks that dataclasses of settings share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


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

"""Sizes of memory as people write and read them."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{prefix}IB": 1 << shift for prefix, shift in (("K", 10), ("M", 20), ("G", 30), ("T", 40))}
_FEWEST_BYTES = 1 << 20
"""A smaller number without a unit has lost its unit."""


def parse_size(text: str, name: str = "memory_budget") -> int:
    """Bytes of a size such as ``8GiB``, ``7.5 GB``, ``900MiB``: a number and a unit, powers of 1000 or (with i) of 1024.

    Args:
        text: the size.
        name: of the setting, for the message.

    Raises:
        ValueError: it is not a positive number with one of these units; without one it is bytes, of which there must be a MiB.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].upper())
    few = match is not None and not match[2] and float(match[1]) < _FEWEST_BYTES
    if match is None or unit is None or few or float(match[1]) <= 0:
        raise ValueError(
            f"{name}: expected a size such as 8GiB, 7.5GB or 900MiB, got {text!r}{' (bytes)' if few else ''}"
        )
    return int(float(match[1]) * unit)


def format_size(count: float, *, up: bool = False) -> str:
    """``2.31 GiB``, ``310.2 MiB`` or ``4.1 KiB``: rounded to the nearest, or up where the figure has to suffice."""
    unit, shift, digits = next(
        (entry for entry in (("GiB", 30, 2), ("MiB", 20, 1)) if count >= 1 << entry[1]), ("KiB", 10, 1)
    )
    value, steps = count / (1 << shift), 10**digits
    return f"{math.ceil(value * steps) / steps if up else value:.{digits}f} {unit}"

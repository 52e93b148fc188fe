"""The patterns that fill objects and whole frames."""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini.canvas import triangle_wave, wave
from cl_methods.scenarios.mini.concepts import PATTERNS


def _step(value: np.ndarray, threshold: float) -> np.ndarray:
    return np.minimum(np.maximum((value - threshold) * 4.0 + 0.5, 0.0), 1.0)


def _fraction(value: np.ndarray) -> np.ndarray:
    return value - np.floor(value) - 0.5


def _mask(name: str, u: np.ndarray, v: np.ndarray, grain: np.ndarray) -> np.ndarray:
    if name == "striped":
        return _step(triangle_wave(u), 0.5)
    if name == "dotted":
        x, y = _fraction(u), _fraction(v)
        return _step(np.sqrt(x * x + y * y), 0.33)
    if name == "checkered":
        return 0.5 - 0.5 * np.minimum(np.maximum(4.0 * wave(u * 0.5) * wave(v * 0.5), -1.0), 1.0)
    if name == "grid":
        return _step(np.minimum(triangle_wave(u), triangle_wave(v)), 0.3)
    if name == "wavy":
        return _step(triangle_wave(v + 0.35 * wave(u * 0.5)), 0.5)
    if name == "zigzag":
        return _step(triangle_wave(v + triangle_wave(u * 0.5)), 0.5)
    if name == "brick":
        row = np.floor(v)
        odd = row - 2.0 * np.floor(row * 0.5)
        return _step(np.minimum(0.5 - np.abs(_fraction(v)), 1.0 - 2.0 * np.abs(_fraction(u * 0.5 + 0.5 * odd))), 0.14)
    if name == "speckled":
        return _step(grain, 0.55)
    if name == "ringed":
        return _step(triangle_wave(np.sqrt(u * u + v * v)), 0.5)
    return np.ones_like(u)


def pattern(kind: np.ndarray, u: np.ndarray, v: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """Where a pattern shows its first colour (1) and where its second (0), anti-aliased.

    Args:
        kind: (B,) indices into ``PATTERNS``.
        u, v: (B, 32, 32) float32 coordinates; a pattern repeats about once a unit.
        grain: (B, 32, 32) float32 noise, used by "speckled".

    Returns:
        (B, 32, 32) float32 in [0, 1].
    """
    mask = np.empty_like(u)
    for index, name in enumerate(PATTERNS):
        chosen = np.flatnonzero(kind == index)
        if len(chosen):
            mask[chosen] = _mask(name, u[chosen], v[chosen], grain[chosen])
    return mask

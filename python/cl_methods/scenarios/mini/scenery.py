"""Ten landscapes, painted from a few random numbers each."""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini.canvas import X, Y, blank, column, cover, paint, triangle_wave, wave
from cl_methods.scenarios.mini.concepts import SCENES
from cl_methods.scenarios.mini.stream import Stream


def _tone(stream: Stream, count: int, red: float, green: float, blue: float, spread: float = 0.08) -> np.ndarray:
    base = np.array([red, green, blue], dtype=np.float32)
    return base + stream.uniform(-spread, spread, (count, 3))


def _below(height: np.ndarray) -> np.ndarray:
    return cover(height - Y)


def _level(stream: Stream, count: int, low: float, high: float) -> np.ndarray:
    return column(stream.uniform(low, high, count)) + column(stream.uniform(-0.08, 0.08, count)) * X


def _disc(
    canvas: np.ndarray, stream: Stream, x: tuple[float, float], y: tuple[float, float], radius: float, tone: np.ndarray
) -> None:
    count = len(canvas)
    dx, dy = X - column(stream.uniform(*x, count)), Y - column(stream.uniform(*y, count))
    paint(canvas, cover(np.sqrt(dx * dx + dy * dy) - column(stream.uniform(radius * 0.7, radius * 1.3, count))), tone)


def _specks(
    canvas: np.ndarray, stream: Stream, number: int, top: float, bottom: float, tone: np.ndarray, radius: float
) -> None:
    for _ in range(number):
        _disc(canvas, stream, (-1.0, 1.0), (top, bottom), radius, tone)


def _beach(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.62, 0.82, 0.97))
    horizon = _level(stream, n, -0.35, 0.0)
    paint(canvas, _below(horizon), _tone(stream, n, 0.10, 0.50, 0.75))
    shore = horizon + column(stream.uniform(0.35, 0.6, n)) + 0.06 * wave(X * 1.2 + column(stream.uniform(0, 1, n)))
    paint(canvas, _below(shore - 0.06), _tone(stream, n, 0.93, 0.96, 0.97, 0.03))
    paint(canvas, _below(shore), _tone(stream, n, 0.92, 0.82, 0.55))
    _disc(canvas, stream, (-0.8, 0.8), (-0.85, -0.6), 0.16, _tone(stream, n, 1.0, 0.95, 0.45, 0.04))
    return canvas


def _forest(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.45, 0.65, 0.45))
    paint(canvas, _below(_level(stream, n, 0.45, 0.75)), _tone(stream, n, 0.20, 0.32, 0.12))
    for _ in range(5):
        x, top = column(stream.uniform(-1, 1, n)), column(stream.uniform(-1.1, -0.4, n))
        foot = column(stream.uniform(0.5, 0.95, n))
        trunk = np.maximum(np.abs(X - x) - 0.06, np.maximum(Y - foot, top - Y))
        paint(canvas, cover(trunk), _tone(stream, n, 0.35, 0.22, 0.10, 0.05))
        cone = np.maximum(np.abs(X - x) - 0.33 * (Y - top), Y - foot + 0.3)
        paint(canvas, cover(cone * 0.9), _tone(stream, n, 0.06, 0.36, 0.12, 0.07))
    return canvas


def _desert(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.97, 0.87, 0.66, 0.05))
    _disc(canvas, stream, (-0.8, 0.8), (-0.85, -0.5), 0.2, _tone(stream, n, 1.0, 0.98, 0.85, 0.03))
    for depth, shade in ((-0.1, 1.0), (0.25, 0.88), (0.6, 0.76)):
        swing = column(stream.uniform(0.08, 0.22, n))
        dune = depth + swing * wave(X * column(stream.uniform(0.3, 0.55, n)) + column(stream.uniform(0, 1, n)))
        paint(canvas, _below(dune), _tone(stream, n, 0.90 * shade, 0.66 * shade, 0.34 * shade, 0.05))
    return canvas


def _ocean(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.70, 0.85, 0.95))
    horizon = _level(stream, n, -0.75, -0.35)
    paint(canvas, _below(horizon), _tone(stream, n, 0.06, 0.28, 0.58))
    bands = triangle_wave(
        Y * column(stream.uniform(1.8, 2.8, n)) + 0.2 * wave(X * 1.5 + column(stream.uniform(0, 1, n)))
    )
    crest = cover((0.72 - bands) * 0.15) * _below(horizon + 0.05)
    paint(canvas, crest, _tone(stream, n, 0.45, 0.70, 0.88))
    return canvas


def _mountain(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.55, 0.75, 0.95))
    for _ in range(3):
        x, top = column(stream.uniform(-0.9, 0.9, n)), column(stream.uniform(-0.85, -0.2, n))
        slope = column(stream.uniform(0.6, 1.0, n))
        side = np.abs(X - x) * slope
        paint(canvas, cover((top + side * 1.4 - Y) * 0.7), _tone(stream, n, 0.42, 0.40, 0.44, 0.07))
        snow = np.maximum(top + side * 1.4 - Y, Y - top - 0.28 - 0.05 * wave(X * 3.0))
        paint(canvas, cover(snow * 0.7), _tone(stream, n, 0.95, 0.96, 0.98, 0.03))
    paint(canvas, _below(_level(stream, n, 0.55, 0.8)), _tone(stream, n, 0.25, 0.48, 0.22))
    return canvas


def _city(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.70, 0.74, 0.80))
    for index in range(5):
        x = column(stream.uniform(-0.15, 0.15, n)) + (index - 2) * 0.42
        top, half = column(stream.uniform(-0.8, 0.2, n)), column(stream.uniform(0.14, 0.22, n))
        wall = np.maximum(np.abs(X - x) - half, top - Y)
        paint(canvas, cover(wall), _tone(stream, n, 0.32, 0.32, 0.38, 0.12))
        panes = np.maximum(
            wall + 0.05, np.maximum(0.45 - triangle_wave((X - x) * 5.3), 0.5 - triangle_wave(Y * 4.0)) * 0.1
        )
        paint(canvas, cover(panes), _tone(stream, n, 0.95, 0.88, 0.50, 0.06))
    paint(canvas, _below(_level(stream, n, 0.72, 0.85)), _tone(stream, n, 0.22, 0.22, 0.24))
    return canvas


def _night(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.04, 0.05, 0.16, 0.04))
    _specks(canvas, stream, 12, -1.0, 0.5, _tone(stream, n, 0.95, 0.95, 0.85, 0.05), 0.04)
    _disc(canvas, stream, (-0.8, 0.8), (-0.8, -0.4), 0.22, _tone(stream, n, 0.93, 0.93, 0.80, 0.04))
    paint(canvas, _below(_level(stream, n, 0.5, 0.85)), _tone(stream, n, 0.05, 0.09, 0.08, 0.03))
    return canvas


def _sunset(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.48, 0.22, 0.48))
    glow = np.minimum(np.maximum(0.5 + 0.6 * Y, 0.0), 1.0)
    paint(canvas, np.ascontiguousarray(np.broadcast_to(glow, (n, 32, 32))), _tone(stream, n, 0.98, 0.52, 0.16))
    _disc(canvas, stream, (-0.5, 0.5), (0.1, 0.4), 0.34, _tone(stream, n, 1.0, 0.84, 0.32, 0.05))
    paint(canvas, _below(_level(stream, n, 0.4, 0.7)), _tone(stream, n, 0.16, 0.08, 0.16, 0.05))
    return canvas


def _meadow(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.55, 0.80, 0.98))
    hill = _level(stream, n, -0.25, 0.1) + 0.1 * wave(X * 0.4 + column(stream.uniform(0, 1, n)))
    paint(canvas, _below(hill), _tone(stream, n, 0.42, 0.75, 0.25))
    for red, green, blue in ((0.95, 0.30, 0.35), (0.98, 0.92, 0.30), (0.97, 0.97, 0.97)):
        _specks(canvas, stream, 4, 0.2, 1.0, _tone(stream, n, red, green, blue, 0.04), 0.06)
    return canvas


def _winter(stream: Stream, n: int) -> np.ndarray:
    canvas = blank(_tone(stream, n, 0.68, 0.74, 0.82))
    paint(canvas, _below(_level(stream, n, 0.0, 0.35)), _tone(stream, n, 0.95, 0.96, 0.99, 0.03))
    x, top = column(stream.uniform(-0.8, 0.8, n)), column(stream.uniform(-0.7, -0.2, n))
    tree = np.maximum(np.abs(X - x) - 0.36 * (Y - top), Y - top - 0.9)
    paint(canvas, cover(tree * 0.9), _tone(stream, n, 0.30, 0.42, 0.42, 0.06))
    _specks(canvas, stream, 12, -1.0, 1.0, _tone(stream, n, 0.99, 0.99, 1.0, 0.01), 0.05)
    return canvas


_PAINTERS = dict(
    zip(SCENES, (_beach, _forest, _desert, _ocean, _mountain, _city, _night, _sunset, _meadow, _winter), strict=True)
)


def landscape(kind: np.ndarray, stream: Stream) -> np.ndarray:
    """Painted scenes.

    Args:
        kind: (B,) indices into ``SCENES``.
        stream: where positions, sizes and tones come from.

    Returns:
        (B, 3, 32, 32) float32 in about [0, 1].
    """
    canvas = np.empty((len(kind), 3, 32, 32), dtype=np.float32)
    for index, name in enumerate(SCENES):
        chosen = np.flatnonzero(kind == index)
        if len(chosen):
            canvas[chosen] = _PAINTERS[name](stream, len(chosen))
    return canvas

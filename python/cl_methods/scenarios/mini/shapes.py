"""Signed distances of the twelve shapes and of strokes, in a frame where a shape fills about the unit disc."""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini.concepts import SHAPES

_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)),
    "star": (
        (0.0, -1.05), (0.25, -0.34), (0.99, -0.32), (0.4, 0.13), (0.62, 0.85),
        (0.0, 0.42), (-0.62, 0.85), (-0.4, 0.13), (-0.99, -0.32), (-0.25, -0.34),
    ),
    "cross": (
        (-0.32, -1.0), (0.32, -1.0), (0.32, -0.32), (1.0, -0.32), (1.0, 0.32), (0.32, 0.32),
        (0.32, 1.0), (-0.32, 1.0), (-0.32, 0.32), (-1.0, 0.32), (-1.0, -0.32), (-0.32, -0.32),
    ),
    "heart": (
        (0.0, -0.45), (0.2, -0.75), (0.5, -0.88), (0.82, -0.72), (0.98, -0.38), (0.88, 0.0), (0.5, 0.5),
        (0.0, 0.98), (-0.5, 0.5), (-0.88, 0.0), (-0.98, -0.38), (-0.82, -0.72), (-0.5, -0.88), (-0.2, -0.75),
    ),
    "diamond": ((0.0, -1.1), (0.62, 0.0), (0.0, 1.1), (-0.62, 0.0)),
    "arrow": ((1.05, 0.0), (0.2, -0.85), (0.2, -0.3), (-1.0, -0.3), (-1.0, 0.3), (0.2, 0.3), (0.2, 0.85)),
    "house": ((0.0, -1.05), (1.0, -0.15), (0.7, -0.15), (0.7, 0.9), (-0.7, 0.9), (-0.7, -0.15), (-1.0, -0.15)),
}  # fmt: skip

_PETALS = ((0.0, -0.6), (0.571, -0.185), (0.353, 0.485), (-0.353, 0.485), (-0.571, -0.185))


def segment_squared(u: np.ndarray, v: np.ndarray, ax, ay, bx, by) -> np.ndarray:
    """Squared distance from (u, v) to the segment a-b; the ends are floats or broadcast over (B, 32, 32)."""
    ex, ey = bx - ax, by - ay
    du, dv = u - ax, v - ay
    along = np.minimum(np.maximum((du * ex + dv * ey) / (ex * ex + ey * ey), 0.0), 1.0)
    du, dv = du - ex * along, dv - ey * along
    return du * du + dv * dv


def _radius(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _polygon(u: np.ndarray, v: np.ndarray, corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    nearest = np.full(u.shape, np.inf, dtype=np.float32)
    inside = np.zeros(u.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        squared = segment_squared(u, v, ax, ay, bx, by)
        nearest = np.minimum(nearest, squared)
        if ay != by:
            inside ^= ((v < ay) != (v < by)) & (u < ax + (v - ay) * ((bx - ax) / (by - ay)))
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance)


def _distance(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if name in _POLYGONS:
        return _polygon(u, v, _POLYGONS[name])
    if name == "circle":
        return _radius(u, v) - 0.9
    if name == "ring":
        return np.abs(_radius(u, v) - 0.75) - 0.2
    if name == "moon":
        return np.maximum(_radius(u, v) - 0.95, 0.8 - _radius(u - 0.45, v + 0.1))
    distance = _radius(u, v) - 0.35
    for x, y in _PETALS:
        distance = np.minimum(distance, _radius(u - x, v - y) - 0.38)
    return distance


def shape_distance(kind: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance, negative inside, in units of the shape's frame.

    Args:
        kind: (B,) indices into ``SHAPES``.
        u, v: (B, 32, 32) float32 coordinates in the shape's frame.

    Returns:
        (B, 32, 32) float32.
    """
    distance = np.empty_like(u)
    for index, name in enumerate(SHAPES):
        chosen = np.flatnonzero(kind == index)
        if len(chosen):
            distance[chosen] = _distance(name, u[chosen], v[chosen])
    return distance

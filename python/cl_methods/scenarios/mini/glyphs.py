"""Ten digits and ten letters as strokes of our own drawing: several ways to write each, and one serif font kept for a task.

Glyphs live in a box of about [-0.6, 0.6] x [-1, 1], y downwards. Arcs use a table of cosines in steps of 15 degrees.
"""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini.concepts import GLYPHS
from cl_methods.scenarios.mini.shapes import segment_squared

Point = tuple[float, float]
Stroke = list[Point]

_QUARTER = (1.0, 0.9659258, 0.8660254, 0.7071068, 0.5, 0.2588190, 0.0)


def _cosine(step: int) -> float:
    step %= 24
    step = min(step, 24 - step)
    return _QUARTER[step] if step <= 6 else -_QUARTER[12 - step]


def _arc(cx: float, cy: float, rx: float, ry: float, first: int, last: int) -> Stroke:
    """Points of an ellipse every 30 degrees; angles in steps of 15 degrees, from the right over the bottom to the left."""
    steps = [*range(first, last, 2), last]
    return [(cx + rx * _cosine(step), cy + ry * _cosine(step - 6)) for step in steps]


_DIGITS: tuple[tuple[list[Stroke], ...], ...] = (
    ([_arc(0, 0, 0.55, 1.0, 0, 24)], [_arc(0, 0, 0.38, 1.0, 18, 42)], [_arc(0, 0, 0.6, 0.85, 19, 42)]),
    (
        [[(0.0, -1.0), (0.0, 1.0)]],
        [[(-0.35, -0.55), (0.0, -1.0), (0.0, 1.0)]],
        [[(-0.3, -0.7), (0.05, -1.0), (0.05, 1.0)], [(-0.4, 1.0), (0.45, 1.0)]],
        [[(0.15, -1.0), (-0.15, 1.0)]],
    ),
    (
        [[*_arc(0, -0.48, 0.5, 0.52, 13, 26), (-0.5, 1.0), (0.55, 1.0)]],
        [[*_arc(0, -0.5, 0.45, 0.5, 14, 27), (-0.2, 0.75), *_arc(-0.35, 0.8, 0.2, 0.2, 8, 18), (0.1, 0.9), (0.6, 0.9)]],
        [[(-0.45, -0.95), (0.25, -0.95), (0.42, -0.6), (0.3, -0.15), (-0.5, 1.0), (0.5, 1.0)]],
    ),
    (
        [_arc(0, -0.5, 0.48, 0.5, 14, 30) + _arc(0, 0.5, 0.52, 0.5, 18, 34)],
        [[(-0.45, -1.0), (0.45, -1.0), (-0.05, -0.2), *_arc(0, 0.4, 0.52, 0.6, 19, 34)]],
        [_arc(-0.05, -0.52, 0.4, 0.42, 13, 29) + _arc(-0.05, 0.42, 0.55, 0.55, 18, 35)],
    ),
    (
        [[(-0.35, -1.0), (-0.5, 0.15), (0.55, 0.15)], [(0.25, -0.45), (0.2, 1.0)]],
        [[(0.3, 1.0), (0.3, -1.0), (-0.6, 0.35), (0.6, 0.35)]],
        [[(-0.5, -1.0), (-0.5, 0.0), (0.5, 0.0)], [(0.5, -1.0), (0.5, 1.0)]],
        [[(0.1, -1.0), (-0.55, 0.3), (0.5, 0.2)], [(0.3, -0.3), (0.0, 1.0)]],
    ),
    (
        [[(0.5, -1.0), (-0.4, -1.0), (-0.45, -0.15), *_arc(0, 0.35, 0.52, 0.62, 16, 34)]],
        [[(-0.3, -0.9), (-0.4, -0.1), *_arc(-0.02, 0.4, 0.5, 0.5, 17, 34)], [(-0.3, -0.9), (0.55, -1.0)]],
        [[(0.55, -0.9), (-0.1, -0.9), (-0.25, -0.1), *_arc(-0.1, 0.4, 0.42, 0.48, 18, 33)]],
    ),
    (
        [[(0.4, -1.0), (-0.1, -0.7), (-0.4, -0.2), *_arc(0, 0.45, 0.5, 0.55, 12, 36)]],
        [[(0.1, -1.0), (-0.35, 0.1), *_arc(0, 0.5, 0.42, 0.45, 12, 36)]],
        [
            [*_arc(0.1, -0.35, 0.55, 0.65, 20, 12)[::-1], (0.35, -0.9)],
            [(-0.45, -0.35), *_arc(0, 0.45, 0.45, 0.55, 12, 36)],
        ],
    ),
    (
        [[(-0.5, -1.0), (0.5, -1.0), (-0.1, 1.0)]],
        [[(-0.5, -0.95), (0.5, -0.95), (-0.05, 1.0)], [(-0.3, 0.05), (0.4, 0.05)]],
        [[(-0.5, -0.65), (-0.45, -0.95), (0.5, -0.95), (0.15, 0.0), (0.0, 1.0)]],
        [[(-0.45, -0.8), (0.1, -0.95), (0.45, -0.75), (0.2, -0.1), (-0.15, 1.0)], [(-0.25, 0.1), (0.4, 0.0)]],
    ),
    (
        [_arc(0, -0.5, 0.42, 0.48, 0, 24), _arc(0, 0.48, 0.52, 0.52, 0, 24)],
        [
            [(0.35, -0.85), *_arc(0, -0.55, 0.38, 0.42, 19, 8)[::-1], (-0.35, -0.4), (0.35, 0.3), (0.4, 0.65)],
            [(0.4, 0.65), *_arc(0, 0.6, 0.42, 0.4, 1, 12), (-0.3, 0.25), (0.3, -0.4), (0.38, -0.8), (0.0, -0.98)],
        ],
        [_arc(0, -0.52, 0.45, 0.46, 0, 24), _arc(-0.05, 0.42, 0.4, 0.5, 0, 24)],
    ),
    (
        [_arc(0, -0.45, 0.5, 0.55, 0, 24), [(0.5, -0.45), (0.45, 0.3), (0.15, 1.0)]],
        [_arc(-0.02, -0.48, 0.45, 0.5, 0, 24), [(0.45, -0.6), (0.42, 1.0)]],
        [_arc(0, -0.45, 0.46, 0.5, 0, 24), [(0.46, -0.45), (0.46, 0.45), *_arc(0, 0.45, 0.46, 0.52, 1, 10)]],
    ),
)

_LETTERS: tuple[tuple[list[Stroke], ...], ...] = (
    ([_arc(0, 0, 0.6, 1.0, 3, 21)], [[(0.5, -0.9), (-0.2, -0.9), (-0.5, -0.5), (-0.5, 0.5), (-0.2, 0.9), (0.5, 0.9)]]),
    (
        [[(0.5, -1.0), (-0.5, -1.0), (-0.5, 1.0), (0.5, 1.0)], [(-0.5, 0.0), (0.4, 0.0)]],
        [_arc(0.05, -0.5, 0.5, 0.48, 6, 20), _arc(0.05, 0.5, 0.55, 0.5, 3, 18)],
    ),
    (
        [[(-0.5, -1.0), (-0.5, 1.0)], [(0.5, -1.0), (0.5, 1.0)], [(-0.5, 0.0), (0.5, 0.0)]],
        [[(-0.4, -1.0), (-0.5, 1.0)], [(0.5, -1.0), (0.4, 1.0)], [(-0.45, 0.1), (0.45, -0.1)]],
    ),
    (
        [[(-0.5, -1.0), (-0.5, 1.0)], [(0.5, -1.0), (-0.5, 0.1)], [(-0.2, -0.2), (0.5, 1.0)]],
        [[(-0.45, -1.0), (-0.45, 1.0)], [(0.5, -0.9), (-0.4, 0.0), (0.5, 0.95)]],
    ),
    (
        [[(-0.6, 1.0), (-0.6, -1.0), (0.0, 0.4), (0.6, -1.0), (0.6, 1.0)]],
        [[(-0.65, 1.0), (-0.4, -1.0), (0.0, 0.9), (0.4, -1.0), (0.65, 1.0)]],
    ),
    (
        [
            [(-0.5, 1.0), (-0.5, -1.0), (0.0, -1.0), *_arc(0.0, -0.5, 0.5, 0.5, 20, 30), (-0.5, 0.0)],
            [(0.0, 0.0), (0.5, 1.0)],
        ],
        [[(-0.45, 1.0), (-0.45, -1.0), (0.3, -0.95), (0.45, -0.5), (0.2, -0.05), (-0.45, 0.0), (0.55, 1.0)]],
    ),
    (
        [[(-0.6, -1.0), (0.6, -1.0)], [(0.0, -1.0), (0.0, 1.0)]],
        [[(-0.5, -0.9), (0.55, -1.0)], [(0.05, -0.95), (-0.05, 1.0)]],
    ),
    (
        [[(-0.65, -1.0), (-0.35, 1.0), (0.0, -0.4), (0.35, 1.0), (0.65, -1.0)]],
        [[(-0.6, -1.0), *_arc(-0.3, 0.4, 0.3, 0.55, 12, 0)[::-1], (-0.3, 0.95), (0.0, -0.5), (0.3, 0.95), (0.6, -1.0)]],
    ),
    (
        [[(-0.5, -1.0), (0.5, 1.0)], [(0.5, -1.0), (-0.5, 1.0)]],
        [[(-0.55, -0.9), (-0.1, -0.1), (0.55, 0.95)], [(0.5, -0.95), (0.05, 0.05), (-0.55, 0.9)]],
    ),
    (
        [[(-0.5, -1.0), (0.5, -1.0), (-0.5, 1.0), (0.5, 1.0)]],
        [[(-0.5, -0.9), (0.45, -1.0), (-0.5, 0.9), (0.5, 1.0)], [(-0.3, 0.0), (0.3, 0.0)]],
    ),
)

_SERIF_LETTERS: tuple[tuple[tuple[Point, ...], ...], ...] = (
    ((*_arc(0, 0, 0.62, 1.0, 4, 20),), ((0.42, -1.05), (0.42, -0.5))),
    (((-0.35, -1.0), (-0.35, 1.0)), ((-0.6, -1.0), (0.55, -1.0), (0.55, -0.65)), ((-0.6, 1.0), (0.6, 1.0), (0.6, 0.65)),
     ((-0.35, -0.05), (0.3, -0.05)), ((0.3, -0.3), (0.3, 0.2))),
    (((-0.42, -1.0), (-0.42, 1.0)), ((0.42, -1.0), (0.42, 1.0)), ((-0.42, 0.0), (0.42, 0.0)), ((-0.68, -1.0), (-0.16, -1.0)),
     ((0.16, -1.0), (0.68, -1.0)), ((-0.68, 1.0), (-0.16, 1.0)), ((0.16, 1.0), (0.68, 1.0))),
    (((-0.42, -1.0), (-0.42, 1.0)), ((0.45, -1.0), (-0.42, 0.15)), ((-0.15, -0.15), (0.5, 1.0)), ((-0.68, -1.0), (-0.16, -1.0)),
     ((0.22, -1.0), (0.65, -1.0)), ((-0.68, 1.0), (-0.16, 1.0)), ((0.28, 1.0), (0.7, 1.0))),
    (((-0.55, 1.0), (-0.55, -1.0)), ((-0.55, -1.0), (0.0, 0.7), (0.55, -1.0)), ((0.55, -1.0), (0.55, 1.0)),
     ((-0.78, -1.0), (-0.55, -1.0)), ((0.55, -1.0), (0.78, -1.0)), ((-0.78, 1.0), (-0.32, 1.0)), ((0.32, 1.0), (0.78, 1.0))),
    (((-0.42, -1.0), (-0.42, 1.0)), ((-0.68, -1.0), (0.05, -1.0), *_arc(0.05, -0.5, 0.45, 0.5, 20, 30), (-0.42, 0.0)),
     ((0.0, 0.0), (0.5, 1.0)), ((-0.68, 1.0), (-0.16, 1.0)), ((0.36, 1.0), (0.68, 1.0))),
    (((0.0, -1.0), (0.0, 1.0)), ((-0.6, -0.65), (-0.6, -1.0), (0.6, -1.0), (0.6, -0.65)), ((-0.28, 1.0), (0.28, 1.0))),
    (((-0.6, -1.0), (-0.32, 1.0), (0.0, -0.7), (0.32, 1.0), (0.6, -1.0)), ((-0.8, -1.0), (-0.4, -1.0)), ((0.4, -1.0), (0.8, -1.0))),
    (((-0.48, -1.0), (0.48, 1.0)), ((0.48, -1.0), (-0.48, 1.0)), ((-0.7, -1.0), (-0.25, -1.0)), ((0.25, -1.0), (0.7, -1.0)),
     ((-0.7, 1.0), (-0.25, 1.0)), ((0.25, 1.0), (0.7, 1.0))),
    (((-0.5, -0.65), (-0.5, -1.0), (0.5, -1.0), (-0.5, 1.0), (0.5, 1.0), (0.5, 0.65)),),
)  # fmt: skip


class Font:
    """Glyphs as a table of segments.

    Args:
        glyphs: for each glyph, the ways to write it; a way is a list of strokes, a stroke a list of points.
    """

    def __init__(self, glyphs: tuple[tuple[list[Stroke], ...], ...]) -> None:
        self.ways = np.array([len(ways) for ways in glyphs], dtype=np.int64)
        writings = [way for ways in glyphs for way in ways]
        self._first = np.concatenate([[0], np.cumsum(self.ways)[:-1]])
        points = [[point for stroke in way for point in stroke] for way in writings]
        most = max(len(p) for p in points)
        self.points = np.array([p + [p[-1]] * (most - len(p)) for p in points], dtype=np.float32)
        pairs = []
        for way in writings:
            starts = np.cumsum([0] + [len(stroke) for stroke in way])
            pairs.append(
                [
                    (start + k, start + k + 1)
                    for start, stroke in zip(starts, way, strict=False)
                    for k in range(len(stroke) - 1)
                ]
            )
        longest = max(len(p) for p in pairs)
        self.pairs = np.array([p + [p[-1]] * (longest - len(p)) for p in pairs], dtype=np.int64)

    def distance(
        self,
        glyph: np.ndarray,
        way: np.ndarray,
        jitter: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
        contrast: float = 0.0,
    ) -> np.ndarray:
        """Distance to the nearest stroke, in units of the glyph's box.

        Args:
            glyph, way: (B,) which glyph and which way to write it (taken modulo the number of ways).
            jitter: (B, P, 2) displacement of up to P points.
            u, v: (B, 32, 32) float32 coordinates.
            contrast: how much wider upright strokes are than level ones.

        Returns:
            (B, 32, 32) float32.
        """
        writing = self._first[glyph] + way % self.ways[glyph]
        points = self.points[writing] + jitter[:, : self.points.shape[1]]
        pairs = self.pairs[writing]
        rows = np.arange(len(glyph))
        distance = np.full(u.shape, np.inf, dtype=np.float32)
        for segment in range(pairs.shape[1]):
            a, b = points[rows, pairs[:, segment, 0]], points[rows, pairs[:, segment, 1]]
            b = np.where(np.abs(b - a) < 1e-3, a + np.float32(1e-3), b)
            ends = [part[:, None, None] for part in (a[:, 0], a[:, 1], b[:, 0], b[:, 1])]
            reach = np.sqrt(segment_squared(u, v, *ends))
            if contrast:
                dx, dy = np.abs(b[:, 0] - a[:, 0]), np.abs(b[:, 1] - a[:, 1])
                reach = reach - np.float32(contrast) * (dy / (dx + dy))[:, None, None]
            distance = np.minimum(distance, reach)
        return distance


HANDWRITING = Font(_DIGITS + _LETTERS)
"""All twenty glyphs in ``GLYPHS`` order, two to four ways each; what pre-training sees."""
SERIF = Font(tuple(([list(stroke) for stroke in strokes],) for strokes in _SERIF_LETTERS))
"""The ten letters with serifs and contrast; only the task ``letters`` shows it."""
MAX_POINTS = max(HANDWRITING.points.shape[1], SERIF.points.shape[1])

assert len(_DIGITS) + len(_LETTERS) == len(GLYPHS)

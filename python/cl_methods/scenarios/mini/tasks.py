"""The seven tasks: the concepts of the mini world drawn by renderers that pre-training has never seen, and real digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cl_methods.scenarios.mini import concepts
from cl_methods.scenarios.mini.canvas import (
    X,
    Y,
    blank,
    column,
    cover,
    enlarge,
    local,
    paint,
    shrink,
    to_bytes,
    triangle_wave,
    wave,
)
from cl_methods.scenarios.mini.generic import jittered, other_colour, pattern_fill, place_apart
from cl_methods.scenarios.mini.glyphs import MAX_POINTS, SERIF
from cl_methods.scenarios.mini.scenery import landscape
from cl_methods.scenarios.mini.shapes import shape_distance
from cl_methods.scenarios.mini.stream import Stream

Renderer = Callable[[np.ndarray, Stream], np.ndarray]


@dataclass(frozen=True)
class TaskSpec:
    """A task's classes, prompts and renderer.

    Attributes:
        class_names: by label, each with what the templates' ``{}`` needs.
        templates: the first is for training.
        render: labels (N,) and a stream to float32 canvases (N, 3, 32, 32); None for the digits, which are photographs.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    render: Renderer | None


def _finish(canvas: np.ndarray, stream: Stream, noise: float) -> np.ndarray:
    return to_bytes(canvas + stream.noise(canvas.shape) * stream.uniform(0.3 * noise, noise, (len(canvas), 1, 1, 1)))


def _sketch(label: np.ndarray, stream: Stream) -> np.ndarray:
    """Outlines with a shaky hand: ink on ruled or plain paper, or chalk on a board."""
    n = len(label)
    paper = np.array([0.93, 0.89, 0.78], dtype=np.float32) + stream.uniform(-0.07, 0.05, (n, 3))
    board = stream.chance(0.4, n)[:, None]
    slate = np.array([0.1, 0.18, 0.15], dtype=np.float32) + stream.uniform(-0.06, 0.1, (n, 3))
    canvas = blank(np.where(board, slate, paper))
    rule = column(stream.uniform(2.0, 3.5, n))
    ruled = column(stream.chance(0.6, n)) * 0.5
    paint(canvas, cover((0.12 - triangle_wave(Y * rule)) * -0.08 - 0.02) * ruled, jittered(np.full(n, 5), stream, 0.2))
    size = stream.uniform(0.45, 0.8, n)
    room = 0.95 - size
    u, v = local(stream.uniform(-1, 1, n) * room, stream.uniform(-1, 1, n) * room, size, stream.uniform(-0.22, 0.22, n))
    ink = np.array([0.12, 0.12, 0.2], dtype=np.float32) + stream.uniform(-0.1, 0.16, (n, 3))
    ink = np.where(board, 1.0 - 0.8 * ink, ink)
    hatch = triangle_wave((u + v) * column(stream.uniform(1.8, 3.0, n)))
    for stroke in range(2):
        amount = column(stream.uniform(0.03, 0.12, n))
        shaky_u = u + amount * wave(v * column(stream.uniform(0.5, 1.3, n)) + column(stream.uniform(0, 1, n)))
        shaky_v = v + amount * wave(u * column(stream.uniform(0.5, 1.3, n)) + column(stream.uniform(0, 1, n)))
        distance = shape_distance(label, shaky_u, shaky_v) * column(size)
        if stroke == 0:
            shaded = column(stream.chance(0.5, n)) * 0.55
            paint(canvas, cover(distance) * np.where(hatch > 0.62, np.float32(1.0), np.float32(0.0)) * shaded, ink)
        pressure = 0.55 + 0.45 * column(stream.uniform(0, 1, n))
        paint(canvas, cover(np.abs(distance) - column(stream.uniform(0.02, 0.06, n))) * pressure, ink)
    return _finish(canvas, stream, 0.08)


def _texture(label: np.ndarray, stream: Stream) -> np.ndarray:
    """Finer, turned and bent patterns in two colours under uneven light."""
    n = len(label)
    colour = stream.integers(len(concepts.COLOURS), n)
    u, v = local(
        stream.uniform(-1, 1, n), stream.uniform(-1, 1, n), np.ones(n, np.float32), stream.uniform(-1.0, 1.0, n)
    )
    u = u + column(stream.uniform(0.0, 0.12, n)) * wave(v * 0.7)
    frequency = column(stream.uniform(1.7, 3.0, n))
    aspect = column(stream.uniform(0.75, 1.3, n))
    first, second = jittered(colour, stream, 0.15), jittered(other_colour(colour, stream), stream, 0.15)
    second = first + (second - first) * stream.uniform(0.6, 1.0, (n, 1))
    canvas = pattern_fill(label, first, second, u * frequency * aspect, v * frequency, stream)
    light = 1.0 + column(stream.uniform(-0.4, 0.4, n)) * X + column(stream.uniform(-0.4, 0.4, n)) * Y
    return _finish(canvas * light[:, None], stream, 0.1)


def _scene(label: np.ndarray, stream: Stream) -> np.ndarray:
    """Landscapes as mosaics of 4 x 4 pixel tiles under coloured light."""
    n = len(label)
    tiles = shrink(landscape(label, stream), 4)
    tiles = tiles + stream.noise(tiles.shape) * stream.uniform(0.03, 0.1, (n, 1, 1, 1))
    tint = 1.0 + stream.uniform(-0.45, 0.3, (n, 3, 1, 1))
    gray = tiles[:, :1] * 0.3 + tiles[:, 1:2] * 0.6 + tiles[:, 2:] * 0.1
    tiles = (tiles + (gray - tiles) * stream.uniform(0.2, 0.8, (n, 1, 1, 1))) * tint
    canvas = tiles.repeat(4, axis=2).repeat(4, axis=3)
    seam = np.maximum(triangle_wave(X * 4.0), triangle_wave(Y * 4.0))
    return _finish(canvas - 0.12 * np.where(seam > 0.7, np.float32(1.0), np.float32(0.0))[:, None], stream, 0.06)


def _letters(label: np.ndarray, stream: Stream) -> np.ndarray:
    """A serif font with contrast, solid or hollow, in two colours under heavy noise and stray lines."""
    n = len(label)
    colour = stream.integers(len(concepts.COLOURS), n)
    front, back = jittered(colour, stream), jittered(other_colour(colour, stream), stream)
    canvas = blank(back)
    size = stream.uniform(0.55, 0.8, n)
    room = 0.95 - size
    cx, cy = stream.uniform(-1, 1, n) * room, stream.uniform(-1, 1, n) * room
    u, v = local(cx, cy, size, stream.uniform(-0.2, 0.2, n))
    jitter = stream.uniform(-0.03, 0.03, (n, MAX_POINTS, 2))
    distance = SERIF.distance(label, np.zeros(n, np.int64), jitter, u, v, contrast=0.1) * column(size)
    distance = distance - column(stream.uniform(0.03, 0.07, n))
    hollow = column(stream.chance(0.5, n))
    paint(canvas, cover(distance + hollow * (np.abs(distance - 0.06) - 0.035 - distance)), front)
    for _ in range(2):
        _, y = local(
            stream.uniform(-1, 1, n), stream.uniform(-1, 1, n), np.ones(n, np.float32), stream.uniform(-1, 1, n)
        )
        paint(canvas, cover(np.abs(y) - 0.02) * 0.6, jittered(stream.integers(len(concepts.COLOURS), n), stream))
    return _finish(canvas, stream, 0.22)


def _compose(label: np.ndarray, stream: Stream) -> np.ndarray:
    """Shape-colour pairs held out of pre-training, in busy scenes and partly covered."""
    n = len(label)
    pairs = np.array(concepts.HELD_OUT)[label]
    shape, colour = pairs[:, 0], pairs[:, 1]
    canvas = landscape(stream.integers(len(concepts.SCENES), n), stream)
    size = stream.uniform(0.4, 0.65, n)
    room = 0.95 - size
    u, v = local(stream.uniform(-1, 1, n) * room, stream.uniform(-1, 1, n) * room, size, stream.uniform(-0.25, 0.25, n))
    distance = shape_distance(shape, u, v) * column(size)
    shade = 1.0 + column(stream.uniform(-0.25, 0.25, n)) * (u - v)
    fill = jittered(colour, stream)[:, :, None, None] * shade[:, None]
    shadow = shape_distance(shape, u - 0.12, v - 0.16) * column(size)
    paint(canvas, cover(shadow) * 0.5, np.zeros((n, 3), np.float32))
    paint(canvas, cover(distance), fill)
    for _ in range(2):
        x, y = stream.uniform(-1, 1, n), stream.uniform(-1, 1, n)
        blot = np.maximum(np.abs(X - column(x)), np.abs(Y - column(y))) - column(stream.uniform(0.06, 0.15, n))
        paint(canvas, cover(blot) * 0.9, jittered(stream.integers(len(concepts.COLOURS), n), stream))
    return _finish(canvas, stream, 0.16)


def _count(label: np.ndarray, stream: Stream) -> np.ndarray:
    """Between one and five tokens of different sizes, rimmed or mere outlines, on patterned cloth with crumbs that do not count."""
    n, most = len(label), concepts.MAX_COUNT
    colour = stream.integers(len(concepts.COLOURS), n)
    ground = other_colour(colour, stream)
    cloth = jittered(ground, stream)
    darker = cloth * stream.uniform(0.7, 0.95, (n, 1))
    u, v = local(stream.uniform(-1, 1, n), stream.uniform(-1, 1, n), np.ones(n, np.float32), stream.uniform(-1, 1, n))
    frequency = column(stream.uniform(3.0, 5.0, n))
    canvas = pattern_fill(stream.integers(2, n), cloth, darker, u * frequency, v * frequency, stream)
    size = stream.uniform(0.18, 0.32, n)
    centre = place_apart(stream, n, most, size)
    rim = jittered(np.where(stream.chance(0.5, n), 11, 9), stream)
    shape = stream.integers(len(concepts.SHAPES), n)
    outlined = column(stream.chance(0.5, n))
    for _ in range(4):
        x, y = X - column(stream.uniform(-1, 1, n)), Y - column(stream.uniform(-1, 1, n))
        paint(canvas, cover(np.sqrt(x * x + y * y) - 0.05), jittered(colour, stream, 0.12))
    for index in range(most):
        scale = size * stream.uniform(0.6, 1.3, n)
        u, v = local(centre[:, index, 0], centre[:, index, 1], scale, stream.uniform(-0.6, 0.6, n))
        distance = shape_distance(shape, u, v) * column(scale)
        shown = column(index <= label)
        paint(canvas, cover(distance - 0.05) * shown * (1.0 - outlined), rim)
        paint(
            canvas,
            cover(distance + outlined * (np.abs(distance) - 0.06 - distance)) * shown,
            jittered(colour, stream, 0.12),
        )
    return _finish(canvas, stream, 0.12)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits that come with scikit-learn: uint8 (1797, 3, 32, 32) and int64 labels.

    8 x 8 pixels of 0 to 16, enlarged bilinearly, bright on dark; in the order of :func:`sklearn.datasets.load_digits`.
    """
    from sklearn.datasets import load_digits  # imported late: it takes a second, and only rendering needs it

    data = load_digits()
    small = (data.images.astype(np.float32) / np.float32(16.0))[:, None]
    canvas = np.ascontiguousarray(np.broadcast_to(enlarge(small), (len(small), 3, 32, 32)))
    return to_bytes(canvas), data.target.astype(np.int64)


_ONE = ("a picture of a {}.", "a photo of a {}.", "an image of a {}.", "a drawing of a {}.")
_MANY = ("a picture of {}.", "a photo of {}.", "an image of {}.", "a drawing of {}.")

TASKS: dict[str, TaskSpec] = {
    "sketch": TaskSpec(concepts.SHAPES, _ONE, _sketch),
    "texture": TaskSpec(tuple(f"{name} pattern" for name in concepts.PATTERNS[: concepts.PLAIN]), _ONE, _texture),
    "scene": TaskSpec(tuple(f"{name} scene" for name in concepts.SCENES), _ONE, _scene),
    "letters": TaskSpec(tuple(f"letter {name}" for name in concepts.LETTERS), _ONE, _letters),
    "compose": TaskSpec(
        tuple(f"{concepts.COLOURS[colour]} {concepts.SHAPES[shape]}" for shape, colour in concepts.HELD_OUT),
        _ONE,
        _compose,
    ),
    "count": TaskSpec(
        ("one object", *(f"{name} objects" for name in concepts.NUMBERS[2 : concepts.MAX_COUNT + 1])), _MANY, _count
    ),
    "digits": TaskSpec(tuple(f"digit {name}" for name in concepts.NUMBERS), _ONE, None),
}

ORDERS: dict[str, tuple[str, ...]] = {
    "I": ("sketch", "texture", "scene", "letters", "compose", "count", "digits"),
    "II": ("scene", "compose", "count", "digits", "letters", "texture", "sketch"),
}

"""The generic renderer: what pre-training and the reference set look at. The tasks have renderers of their own.

Every image keeps the facts it shows, so it is known which captions are true of it. Facts are int64 columns, -1 where an image
shows no such thing; see ``FACTS``.
"""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini import concepts
from cl_methods.scenarios.mini.canvas import X, Y, blank, column, cover, enlarge, local, paint, shrink, smooth, to_bytes
from cl_methods.scenarios.mini.glyphs import HANDWRITING, MAX_POINTS
from cl_methods.scenarios.mini.patterns import pattern
from cl_methods.scenarios.mini.scenery import landscape
from cl_methods.scenarios.mini.shapes import shape_distance
from cl_methods.scenarios.mini.stream import Stream

FACTS = ("shape", "colour", "pattern", "scene", "ground", "glyph", "count")
KINDS = ("object", "glyph", "count", "pattern", "scene")
SHARES = {"object": 0.36, "glyph": 0.28, "count": 0.18, "pattern": 0.14, "scene": 0.04}
COLUMN = {name: index for index, name in enumerate(FACTS)}


def jittered(colour: np.ndarray, stream: Stream, spread: float = 0.08) -> np.ndarray:
    """RGB (B, 3) of palette indices (B,), each channel moved by up to ``spread``."""
    return concepts.PALETTE[colour] + stream.uniform(-spread, spread, (len(colour), 3))


def other_colour(colour: np.ndarray, stream: Stream) -> np.ndarray:
    """A palette index different from ``colour``, (B,)."""
    return (colour + 1 + stream.integers(len(concepts.COLOURS) - 1, len(colour))) % len(concepts.COLOURS)


def allowed_pairs(stream: Stream, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Random shapes and colours (n,), never a held-out pair; shapes are uniform."""
    choices = np.array([np.flatnonzero(row) for row in concepts.ALLOWED])
    shape = stream.integers(len(concepts.SHAPES), n)
    return shape, choices[shape, stream.integers(choices.shape[1], n)]


def pattern_fill(
    kind: np.ndarray, first: np.ndarray, second: np.ndarray, u: np.ndarray, v: np.ndarray, stream: Stream
) -> np.ndarray:
    """Two colours (B, 3) mixed by a pattern over coordinates (u, v): (B, 3, 32, 32)."""
    grain = stream.noise(u.shape)
    mask = pattern(kind, u, v, grain)[:, None]
    first, second = first[:, :, None, None], second[:, :, None, None]
    return second + mask * (first - second)


def backgrounds(stream: Stream, n: int, avoid: np.ndarray, facts: np.ndarray, scenes: float) -> np.ndarray:
    """Canvases (n, 3, 32, 32): a scene with probability ``scenes``, else a plain colour other than ``avoid`` (n,)."""
    with_scene = stream.chance(scenes, n)
    scene = np.where(with_scene, stream.integers(len(concepts.SCENES), n), -1)
    ground = np.where(with_scene, -1, other_colour(avoid, stream))
    facts[:, COLUMN["scene"]], facts[:, COLUMN["ground"]] = scene, ground
    canvas = landscape(scene, stream)
    plain = np.flatnonzero(~with_scene)
    canvas[plain] = blank(jittered(ground[plain], stream))
    slope = column(stream.uniform(-0.12, 0.12, n)) * X + column(stream.uniform(-0.12, 0.12, n)) * Y
    return canvas + slope[:, None]


def _second_tone(first: np.ndarray, stream: Stream) -> np.ndarray:
    """A colour for the gaps of a pattern: a darker or lighter tone of the first."""
    darker = stream.chance(0.5, len(first))[:, None]
    amount = stream.uniform(0.55, 0.8, (len(first), 1))
    light = first[:, :1] * 0.3 + first[:, 1:2] * 0.6 + first[:, 2:] * 0.1
    darker = (darker | (light > 0.75)) & (light > 0.25)
    return np.where(darker, first * (1.0 - amount), first + (1.0 - first) * amount).astype(np.float32)


def _objects(stream: Stream, n: int, facts: np.ndarray) -> np.ndarray:
    shape, colour = allowed_pairs(stream, n)
    plain = stream.chance(0.3, n)
    kind = np.where(plain, concepts.PLAIN, stream.integers(concepts.PLAIN, n))
    facts[:, COLUMN["shape"]], facts[:, COLUMN["colour"]], facts[:, COLUMN["pattern"]] = shape, colour, kind
    facts[:, COLUMN["count"]] = 0
    canvas = backgrounds(stream, n, colour, facts, 0.5)
    size = stream.uniform(0.42, 0.8, n)
    room = 1.0 - size
    cx, cy = stream.uniform(-1, 1, n) * room, stream.uniform(-1, 1, n) * room
    u, v = local(cx, cy, size, stream.uniform(-0.2, 0.2, n))
    stretch = column(stream.uniform(0.85, 1.2, n))
    distance = shape_distance(kind=shape, u=u * stretch, v=v / stretch) * column(size)
    first = jittered(colour, stream)
    frequency = column(stream.uniform(1.3, 2.4, n))
    pu, pv = local(cx, cy, size, stream.uniform(-0.6, 0.6, n))
    fill = pattern_fill(kind, first, _second_tone(first, stream), pu * frequency, pv * frequency, stream)
    outlined = stream.chance(0.3, n)
    rim = jittered(colour, stream) * np.where(stream.chance(0.5, n), np.float32(0.35), np.float32(1.0))[:, None]
    width = column(stream.uniform(0.06, 0.13, n))
    hollow = outlined & plain & stream.chance(0.6, n)
    body = cover(distance) * np.where(hollow, np.float32(0.0), np.float32(1.0))[:, None, None]
    paint(canvas, body, fill)
    paint(canvas, cover(np.abs(distance) - width) * column(outlined), rim)
    return canvas


def _glyphs(stream: Stream, n: int, facts: np.ndarray) -> np.ndarray:
    glyph, colour = stream.integers(len(concepts.GLYPHS), n), stream.integers(len(concepts.COLOURS), n)
    monochrome = stream.chance(0.4, n)
    white_on_black = stream.chance(0.5, n)
    white, black = concepts.COLOURS.index("white"), concepts.COLOURS.index("black")
    colour = np.where(monochrome, np.where(white_on_black, white, black), colour)
    facts[:, COLUMN["glyph"]], facts[:, COLUMN["colour"]] = glyph, colour
    canvas = backgrounds(stream, n, colour, facts, 0.15)
    ground = np.where(white_on_black, black, white)
    flat = np.flatnonzero(monochrome)
    canvas[flat] = blank(jittered(ground[flat], stream))
    facts[flat, COLUMN["ground"]], facts[flat, COLUMN["scene"]] = ground[flat], -1
    size = stream.uniform(0.5, 0.88, n)
    room = 1.0 - size
    u, v = local(stream.uniform(-1, 1, n) * room, stream.uniform(-1, 1, n) * room, size, stream.uniform(-0.15, 0.15, n))
    u = u * column(stream.uniform(0.75, 1.35, n)) + v * column(stream.uniform(-0.3, 0.3, n))
    u = u + column(stream.uniform(-0.12, 0.12, n)) * (v * v)
    jitter = stream.uniform(-1.0, 1.0, (n, MAX_POINTS, 2)) * stream.uniform(0.02, 0.11, (n, 1, 1))
    distance = HANDWRITING.distance(glyph, stream.integers(12, n), jitter, u, v) * column(size)
    width = column(stream.uniform(0.05, 0.2, n))
    paint(canvas, cover(distance - width, stream.uniform(0.8, 4.0, n)), jittered(colour, stream))
    return canvas


def place_apart(stream: Stream, n: int, most: int, size: np.ndarray) -> np.ndarray:
    """Centres (n, most, 2) on a jittered 3 x 3 grid, all cells of an image different."""
    cell = np.argsort(stream.uniform(0.0, 1.0, (n, 9)), axis=1, kind="stable")[:, :most]
    centre = np.stack([cell % 3 - 1, cell // 3 - 1], axis=2).astype(np.float32) * np.float32(0.64)
    return centre + stream.uniform(-1.0, 1.0, (n, most, 2)) * np.maximum(0.34 - size, 0.02)[:, None, None]


def companions(
    stream: Stream,
    shape: np.ndarray,
    colour: np.ndarray,
    same_shape: np.ndarray,
    same_colour: np.ndarray,
    ground: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Shapes and colours (n,) of further objects beside an allowed pair (shape, colour): never held out, never ground's colour."""
    mixed_shape, mixed_colour = allowed_pairs(stream, len(shape))
    new_colour = np.where(same_colour | (mixed_colour == ground), colour, mixed_colour)
    fits = concepts.ALLOWED[mixed_shape, new_colour]
    new_shape = np.where(same_shape | ~fits, shape, mixed_shape)
    return new_shape, np.where(concepts.ALLOWED[new_shape, new_colour], new_colour, colour)


def _counts(stream: Stream, n: int, facts: np.ndarray) -> np.ndarray:
    most = concepts.MAX_COUNT
    count = stream.integers(most, n)
    same_shape, same_colour = stream.chance(0.6, n) | (count == 0), stream.chance(0.6, n) | (count == 0)
    shape, colour = allowed_pairs(stream, n)
    facts[:, COLUMN["count"]] = count
    facts[:, COLUMN["shape"]] = np.where(same_shape, shape, -1)
    facts[:, COLUMN["colour"]] = np.where(same_colour, colour, -1)
    facts[:, COLUMN["pattern"]] = concepts.PLAIN
    canvas = backgrounds(stream, n, colour, facts, 0.25)
    size = stream.uniform(0.16, 0.34, n)
    centre = place_apart(stream, n, most, size)
    ground = facts[:, COLUMN["ground"]]
    for index in range(most):
        this_shape, this_colour = companions(stream, shape, colour, same_shape, same_colour, ground)
        scale = size * stream.uniform(0.8, 1.2, n)
        u, v = local(centre[:, index, 0], centre[:, index, 1], scale, stream.uniform(-0.2, 0.2, n))
        shown = column(index <= count)
        paint(
            canvas, cover(shape_distance(this_shape, u, v) * column(scale)) * shown, jittered(this_colour, stream, 0.05)
        )
    return canvas


def _patterns(stream: Stream, n: int, facts: np.ndarray) -> np.ndarray:
    kind, colour = stream.integers(concepts.PLAIN, n), stream.integers(len(concepts.COLOURS), n)
    facts[:, COLUMN["pattern"]], facts[:, COLUMN["colour"]] = kind, colour
    first = jittered(colour, stream)
    two_coloured = stream.chance(0.6, n)[:, None]
    second = np.where(two_coloured, jittered(other_colour(colour, stream), stream), _second_tone(first, stream))
    zero = stream.uniform(-1.0, 1.0, n)
    u, v = local(zero, stream.uniform(-1.0, 1.0, n), np.ones(n, np.float32), stream.uniform(-0.6, 0.6, n))
    frequency = column(stream.uniform(1.6, 3.6, n))
    return pattern_fill(kind, first, second, u * frequency, v * frequency, stream)


def _scenes(stream: Stream, n: int, facts: np.ndarray) -> np.ndarray:
    scene = stream.integers(len(concepts.SCENES), n)
    facts[:, COLUMN["scene"]] = scene
    return landscape(scene, stream)


def camera(canvas: np.ndarray, stream: Stream) -> np.ndarray:
    """What a camera adds: exposure and tint, sometimes blur or a low resolution, noise. Returns float32 (B, 3, 32, 32)."""
    n = len(canvas)
    gain = 1.0 + stream.uniform(-0.25, 0.25, (n, 1, 1, 1)) + stream.uniform(-0.1, 0.1, (n, 3, 1, 1))
    canvas = canvas * gain + stream.uniform(-0.12, 0.12, (n, 1, 1, 1))
    degraded = stream.uniform(0.0, 1.0, n)
    blurred = np.flatnonzero(degraded < 0.1)
    canvas[blurred] = smooth(canvas[blurred], 1)
    coarse = np.flatnonzero((degraded >= 0.1) & (degraded < 0.2))
    canvas[coarse] = enlarge(shrink(canvas[coarse], 2))
    coarser = np.flatnonzero((degraded >= 0.2) & (degraded < 0.25))
    canvas[coarser] = enlarge(shrink(canvas[coarser], 4))
    strength = stream.uniform(0.0, 1.0, (n, 1, 1, 1))
    return canvas + stream.noise(canvas.shape) * (0.1 * strength * strength)


_RENDERERS = {"object": _objects, "glyph": _glyphs, "count": _counts, "pattern": _patterns, "scene": _scenes}


def render(kinds: dict[str, int], stream: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generic images with the facts they show.

    Args:
        kinds: how many images of each of ``KINDS``.
        stream: where everything random comes from.

    Returns:
        images uint8 (N, 3, 32, 32), facts int64 (N, len(FACTS)), kind int64 (N,) as indices into ``KINDS``; kinds in a row.
    """
    images, all_facts, labels = [], [], []
    for name, n in kinds.items():
        facts = np.full((n, len(FACTS)), -1, dtype=np.int64)
        if n == 0:
            continue
        canvas = _RENDERERS[name](stream, n, facts)
        images.append(to_bytes(camera(canvas, stream)))
        all_facts.append(facts)
        labels.append(np.full(n, KINDS.index(name)))
    return np.concatenate(images), np.concatenate(all_facts), np.concatenate(labels)

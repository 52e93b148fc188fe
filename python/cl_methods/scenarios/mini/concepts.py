"""What the mini world is made of: its words for shapes, colours, patterns, scenes, glyphs and numbers."""

from __future__ import annotations

import numpy as np

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "moon",
    "arrow",
    "house",
    "flower",
)
PLURALS = {"cross": "crosses"}
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white", "gray", "black")
PATTERNS = ("striped", "dotted", "checkered", "grid", "wavy", "zigzag", "brick", "speckled", "ringed", "plain")
SCENES = ("beach", "forest", "desert", "ocean", "mountain", "city", "night", "sunset", "meadow", "winter")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = ("c", "e", "h", "k", "m", "r", "t", "w", "x", "z")
GLYPHS = tuple(f"digit {name}" for name in NUMBERS) + tuple(f"letter {name}" for name in LETTERS)
MAX_COUNT = 5

PLAIN = PATTERNS.index("plain")

PALETTE = np.array(
    [
        (0.85, 0.12, 0.12), (0.95, 0.55, 0.10), (0.95, 0.90, 0.20), (0.15, 0.65, 0.20), (0.20, 0.85, 0.85), (0.12, 0.25, 0.85),
        (0.55, 0.15, 0.70), (0.98, 0.60, 0.75), (0.48, 0.28, 0.12), (0.97, 0.97, 0.97), (0.52, 0.52, 0.52), (0.04, 0.04, 0.04),
    ],
    dtype=np.float32,
)  # fmt: skip

HELD_OUT = tuple((shape, (5 * shape + 3 + 4 * pick) % len(COLOURS)) for shape in range(len(SHAPES)) for pick in (0, 1))
"""The 24 (shape, colour) pairs, two for every shape and two for every colour, that pre-training and reference data never show."""

ALLOWED = np.ones((len(SHAPES), len(COLOURS)), dtype=bool)
for _shape, _colour in HELD_OUT:
    ALLOWED[_shape, _colour] = False


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return PLURALS.get(noun, noun + "s")

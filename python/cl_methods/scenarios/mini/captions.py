"""Captions of generic images, and which captions are true of which images."""

from __future__ import annotations

import numpy as np

from cl_methods.scenarios.mini import concepts
from cl_methods.scenarios.mini.generic import COLUMN, FACTS
from cl_methods.scenarios.mini.stream import Stream

TEMPLATES = (
    "{}", "a picture of {}", "a photo of {}", "an image of {}", "a drawing of {}", "a painting of {}", "a render of {}",
    "this is {}", "there is {}", "a good photo of {}", "a blurry picture of {}", "a clean image of {}", "a close view of {}",
)  # fmt: skip
"""A phrase brings its own article, so the same templates serve "a star" and "three stars"; it is always "a", as in CLIP."""


def phrases(fact: str) -> tuple[tuple[str, ...], ...]:
    """For every value of a fact, the phrases that say just that value."""
    if fact == "shape":
        return tuple((f"a {name}",) for name in concepts.SHAPES)
    if fact == "colour":
        return tuple((f"a {name} object", f"something {name}") for name in concepts.COLOURS)
    if fact == "pattern":
        return tuple((f"a {name} pattern", f"a {name} object") for name in concepts.PATTERNS)
    if fact == "scene":
        return tuple((f"a {name}", f"a {name} scene") for name in concepts.SCENES)
    if fact == "ground":
        return tuple((f"something on a {name} background",) for name in concepts.COLOURS)
    if fact == "glyph":
        return tuple((f"the {name}", f"a {name}") for name in concepts.GLYPHS)
    if fact == "count":
        return tuple(
            (f"{name} object" if name == "one" else f"{name} objects",)
            for name in concepts.NUMBERS[1 : concepts.MAX_COUNT + 1]
        )
    raise ValueError(f"fact: expected one of {FACTS}, got {fact!r}")


def mention(facts: np.ndarray, stream: Stream) -> np.ndarray:
    """Choose what a caption of each image says: ``facts`` (N, F) with some columns set to -1.

    Something that names a thing always stays: the glyph, the number, the shape, the pattern of a full frame, or the scene.
    """
    said = facts.copy()
    n = len(facts)
    has = {name: facts[:, column] >= 0 for name, column in COLUMN.items()}
    single = has["shape"] & (facts[:, COLUMN["count"]] == 0)
    drop = {
        "colour": stream.chance(0.4, n),
        "pattern": stream.chance(0.4, n) & (has["shape"] | has["count"]),
        "scene": stream.chance(0.4, n) & (has["shape"] | has["count"] | has["glyph"]),
        "ground": stream.chance(0.6, n),
        "shape": stream.chance(0.15, n) & has["count"],
        "count": stream.chance(0.15, n) & has["shape"] & ~single,
    }
    drop["count"] |= single & stream.chance(0.85, n)
    drop["count"] &= ~drop["shape"] | single
    drop["shape"] &= ~(drop["count"] & single)
    for name, dropped in drop.items():
        said[dropped, COLUMN[name]] = -1
    return said


def _noun_phrase(value: dict[str, int]) -> str:
    adjectives = []
    if value["colour"] >= 0:
        adjectives.append(concepts.COLOURS[value["colour"]])
    if value["pattern"] >= 0:
        adjectives.append(concepts.PATTERNS[value["pattern"]])
    if value["glyph"] >= 0:
        noun, number = concepts.GLYPHS[value["glyph"]], -1
    elif value["shape"] >= 0 or value["count"] >= 0:
        noun = concepts.SHAPES[value["shape"]] if value["shape"] >= 0 else "object"
        number = value["count"]
    elif value["pattern"] >= 0:
        noun, number = "pattern", -1
    else:
        return ""
    if number >= 1:
        noun = concepts.plural(noun)
    words = [*adjectives, noun]
    return " ".join([concepts.NUMBERS[number + 1] if number >= 0 else "a", *words])


def write(said: np.ndarray, stream: Stream) -> list[str]:
    """One sentence per row of mentioned facts (N, F), in a random template."""
    template = stream.integers(len(TEMPLATES), len(said))
    front = stream.chance(0.5, len(said))
    texts = []
    for row, values in enumerate(said.tolist()):
        value = dict(zip(FACTS, values, strict=True))
        phrase = _noun_phrase(value)
        if value["scene"] >= 0:
            scene = f"a {concepts.SCENES[value['scene']]}" + (" scene" if not phrase or front[row] else "")
            phrase = f"{phrase} in {scene}" if phrase else scene
        if value["ground"] >= 0:
            ground = f"a {concepts.COLOURS[value['ground']]} background"
            phrase = f"{phrase or 'something'} on {ground}"
        texts.append(TEMPLATES[template[row]].format(phrase))
    return texts


def truth(facts: np.ndarray, said: np.ndarray) -> np.ndarray:
    """(N, M) bool: caption j is true of image i if every fact that it mentions is one that the image shows.

    Args:
        facts: (N, F) what images show, -1 for nothing.
        said: (M, F) what captions mention, -1 for not mentioned.
    """
    result = np.ones((len(facts), len(said)), dtype=bool)
    for column in range(facts.shape[1]):
        result &= (said[None, :, column] < 0) | (said[None, :, column] == facts[:, None, column])
    return result

"""Captions from a text file, a tab-separated table, or the shards of an image-text dataset; or none, but random tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cl_methods.datasets.archives import Part, parts
from cl_methods.datasets.images import DataError
from cl_methods.datasets.listing import IMAGE_SUFFIXES
from cl_methods.datasets.task import RandomTexts

_OPTION = "data.reference_captions"
_TEXTS = frozenset([".txt", ".json"])
_RANDOM = re.compile(r"random(?::(\d+)x(\d+)(?::(\d+))?)?")
CAPTION_COLUMNS = ("title", "caption")


def random_texts_of(text: str) -> RandomTexts | None:
    """``random``, ``random:1000x10`` or ``random:1000x10:SEED``: how many texts of how many random tokens; None for anything else.

    Raises:
        DataError: it begins so, but goes on otherwise, or asks for nothing.
    """
    if text != "random" and not text.startswith("random:"):
        return None
    found = _RANDOM.fullmatch(text)
    given = [int(number) for number in found.groups() if number is not None] if found is not None else [0]
    if 0 in given[:2]:
        raise DataError(f"{_OPTION}: expected random, random:TEXTSxTOKENS or random:TEXTSxTOKENS:SEED, got {text!r}")
    return RandomTexts(*given)


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions from a text file, one per line, or from a tab-separated table as Conceptual Captions is distributed.

    A file is a table if its first line holds a tab. The captions of a table are the column ``title`` or ``caption`` of its header,
    and the first column where there is no such header (``caption``, tab, address). Lines without a caption are passed over.

    Raises:
        DataError: the file is missing, is not UTF-8 text, has a row that ends before the captions, or holds no caption.
    """
    rows = read_rows(path, _OPTION)
    place, first = 0, 0
    if rows and len(rows[0][1]) > 1:
        header = rows[0][1]
        named = next((name for name in CAPTION_COLUMNS if name in header), None)
        place, first = (header.index(named), 1) if named is not None else (0, 0)
    else:
        rows = [(number, ["\t".join(row)]) for number, row in rows]
    for number, row in rows[first:]:
        if len(row) <= place:
            raise DataError(
                f"{_OPTION}: {path} line {number} has {len(row)} columns, and the captions are column {place + 1}"
            )
    captions = tuple(row[place].strip() for _, row in rows[first:] if row[place].strip())
    if not captions:
        raise DataError(f"{_OPTION}: {path} holds no caption")
    return captions


def read_rows(path: Path, option: str) -> list[tuple[int, list[str]]]:
    """Numbers and tab-separated columns of the lines of a text file that are not empty; quotes mean themselves.

    Args:
        path: the file.
        option: what it was given as, for messages.

    Raises:
        DataError: the file is missing or is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option}: {path} cannot be read as UTF-8 text ({error})") from error
    return [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_shard_captions(archives: list[Path]) -> tuple[str, ...]:
    """The caption of every image in tar shards: ``KEY.txt``, or ``caption`` in ``KEY.json``; empty ones are passed over.

    Args:
        archives: such as img2dataset writes.

    Raises:
        DataError: a shard is cut off, compressed or none, or an image lacks its caption, or there is none at all.
    """
    captions: list[str] = []
    for shard in archives:
        texts: dict[str, str] = {}
        images: dict[str, str] = {}
        for part in parts(shard, shard.name, _TEXTS):
            if part.suffix in IMAGE_SUFFIXES:
                images[part.key] = part.member.name
            elif part.suffix == ".txt" or (part.suffix == ".json" and part.key not in texts):
                caption = _caption(shard, part)
                if caption is not None:
                    texts[part.key] = caption
        without = next((name for key, name in images.items() if key not in texts), None)
        if without is not None:
            raise DataError(f"{_OPTION}: {shard}: {without} lacks its caption (KEY.txt, or `caption` in KEY.json)")
        captions += [texts[key] for key in images if texts[key]]
    if not captions:
        raise DataError(
            f"{_OPTION}: {archives[0]} … holds no caption (KEY.jpg with KEY.txt, or with `caption` in KEY.json)"
        )
    return tuple(captions)


def _caption(shard: Path, part: Part) -> str | None:
    """One line of text; None where a JSON file has no caption."""
    try:
        text = part.content.decode("utf-8-sig")
        found = json.loads(text) if part.suffix == ".json" else text
    except ValueError as error:
        raise DataError(
            f"{_OPTION}: {shard}: {part.member.name} cannot be read ({error}); fetch the shard again"
        ) from error
    if part.suffix == ".json":
        found = found.get("caption") if isinstance(found, dict) else None
    return " ".join(found.split()) if isinstance(found, str) else None

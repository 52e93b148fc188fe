"""Names from data, made safe to show: data may be printed, but it may not control a terminal or a page."""

from __future__ import annotations

import unicodedata
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that are obeyed and not shown: escapes, changes of direction, line separators."""


def printable(text: str) -> str:
    """The text with control characters as visible escapes; tabs and line ends stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\t\n" or unicodedata.category(character) not in _HIDDEN
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )


def printable_values(content: Any) -> Any:
    """Nested plain values with every text in them, keys too, as :func:`printable` gives it."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, dict):
        return {printable_values(key): printable_values(value) for key, value in content.items()}
    return [printable_values(value) for value in content] if isinstance(content, list) else content

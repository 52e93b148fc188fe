"""Texts that begin alike, computed once for what they share: prefix trees of tokens in place of rows of tokens.

In a causal text tower a position sees only what precedes it, so prompts with a common beginning ("a photo of a …") have the
same activations there. Their tokens are packed as trees, depth first, into rows; a mask lets every token see its ancestors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_methods import lazy_open_clip

CAPACITY = 128
"""Tokens of a row: long rows share more, and attention costs L / 6 D of the matrix products, 4 % at a width of 512."""

_ROWS = 128
_TREE_FORWARDS: set[Callable[..., Any]] = set()
_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def open_clip_blocks() -> tuple[type, type]:
    """open_clip's two kinds of residual blocks."""
    transformer = lazy_open_clip.transformer
    return transformer.ResidualAttentionBlock, transformer.CustomResidualAttentionBlock


def reads_trees(forward: _Forward) -> _Forward:
    """Mark a replaced ``forward`` of a residual block: it takes masks (B heads, L, L), and treats all positions alike."""
    _TREE_FORWARDS.add(forward)
    return forward


def takes_trees(transformer: Any) -> bool:
    """Whether every block is open_clip's own, or runs a ``forward`` that is marked by :func:`reads_trees`."""
    if type(transformer) is not lazy_open_clip.transformer.Transformer:
        return False
    blocks = open_clip_blocks()
    for block in transformer.resblocks:
        own = vars(block).get("forward")
        if type(block) not in blocks:
            return False
        if own is not None and not (isinstance(own, partial) and own.func in _TREE_FORWARDS):
            return False
    return True


@dataclass(frozen=True)
class TextTrees:
    """Rows of packed tokens.

    Attributes:
        tokens, depths: (B, L) int64, ids and positions in their texts; zero where a row is not full.
        ends: (B, L) int64, the first place after a token's descendants.
        rows, places: (N,) int64, where each text is read.
    """

    tokens: Tensor
    depths: Tensor
    ends: Tensor
    rows: Tensor
    places: Tensor

    def parts(self) -> Iterator[tuple[TextTrees, Tensor]]:
        """Some rows at a time, which bounds memory, with the texts (n,) that are read in them."""
        for first in range(0, len(self.tokens), _ROWS):
            texts = ((self.rows >= first) & (self.rows < first + _ROWS)).nonzero().squeeze(1)
            tokens, depths, ends = (part[first : first + _ROWS] for part in (self.tokens, self.depths, self.ends))
            yield TextTrees(tokens, depths, ends, self.rows[texts] - first, self.places[texts]), texts

    def to(self, device: torch.device) -> TextTrees:
        """The same on a device."""
        return TextTrees(*(part.to(device, non_blocking=True) for part in vars(self).values()))

    def mask(self, heads: int, dtype: torch.dtype) -> Tensor:
        """(B heads, L, L): zero where a token sees another, minus infinity elsewhere."""
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        sees = (place <= place[:, None]) & (place[:, None] < self.ends[:, None, :])
        hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))
        return hidden.repeat_interleave(heads, dim=0)


@dataclass
class _Row:
    """A row that is being filled; ``path`` holds the places of the latest text's tokens."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    def add(self, text: tuple[int, ...], shared: int) -> None:
        self.leave(shared)
        for depth in range(shared, len(text)):
            self.path.append(len(self.tokens))
            self.tokens.append(text[depth])
            self.depths.append(depth)
            self.ends.append(0)

    def leave(self, depth: int) -> None:
        for place in self.path[depth:]:
            self.ends[place] = len(self.tokens)
        del self.path[depth:]


def plant(tokens: Tensor, lengths: Tensor, capacity: int | None = None) -> TextTrees:
    """Pack texts into rows of at most ``capacity`` tokens, or of the longest text's.

    Args:
        tokens: (N, L) int64 on the CPU, N at least 1.
        lengths: (N,) int64, how many tokens of each count.
        capacity: of a row; :data:`CAPACITY` when None.
    """
    texts = [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    capacity = max(CAPACITY if capacity is None else capacity, *map(len, texts))
    rows, found = [_Row()], [(0, 0)] * len(texts)
    before: tuple[int, ...] = ()
    for index in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[index]
        shared = _common(before, text)
        if len(rows[-1].tokens) + len(text) - shared > capacity:
            rows[-1].leave(0)
            rows.append(_Row())
            shared = 0
        rows[-1].add(text, shared)
        found[index] = len(rows) - 1, rows[-1].path[-1]
        before = text
    rows[-1].leave(0)
    width = max(len(row.tokens) for row in rows)
    places = torch.arange(width)
    packed = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("tokens", "depths")}
    ends = (places + 1).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        for name, values in (*packed.items(), ("ends", ends)):
            values[number, : len(row.tokens)] = torch.tensor(getattr(row, name), dtype=torch.int64)
    where = torch.tensor(found, dtype=torch.int64)
    return TextTrees(packed["tokens"], packed["depths"], ends, where[:, 0], where[:, 1])


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first tokens two texts share."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count

"""Texts tokenised once, however often a prediction asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class RememberedTokens:
    """A tokenizer that keeps what it has tokenised.

    Every count of a run asks for the prompts of all its classes, and for thousands of captions that are the same sentence.

    Args:
        tokenize: texts -> int64 (N, context), each row a function of its text alone.
    """

    def __init__(self, tokenize: Callable[[Sequence[str]], Tensor]) -> None:
        self._tokenize = tokenize
        self._rows: dict[str, int] = {}
        self._table: Tensor = tokenize([])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, context) int64 on the CPU, as the tokenizer itself gives."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            self._table = torch.cat([self._table, self._tokenize(new)])
            self._rows |= {text: len(self._rows) + place for place, text in enumerate(new)}
        return self._table[torch.tensor([self._rows[text] for text in texts], dtype=torch.int64)]

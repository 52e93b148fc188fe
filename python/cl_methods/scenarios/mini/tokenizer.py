"""A word-level tokenizer for the language of the mini world."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_methods.scenarios.mini import concepts

CONTEXT_LENGTH = 16
PAD, START = 0, 1

_GRAMMAR = (
    "a an and background blurry clean close digit drawing front good image in is letter nice object objects of on painting pattern "
    "photo picture render scene small something the there this thing view with"
)
WORDS = tuple(
    sorted(
        {
            *_GRAMMAR.split(),
            *concepts.SHAPES,
            *map(concepts.plural, concepts.SHAPES),
            *concepts.COLOURS,
            *concepts.PATTERNS,
            *concepts.SCENES,
            *concepts.NUMBERS,
            *concepts.LETTERS,
        }
    )
)
END = len(WORDS) + 2
VOCABULARY_SIZE = END + 1
_IDS = {word: index + 2 for index, word in enumerate(WORDS)}


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " ").replace(",", " ").split()


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """Token ids (N, 16) int64: start, the words, end, padding. The end has the largest id, where open_clip reads the feature.

    Case, full stops and commas are ignored.

    Raises:
        ValueError: a word is not in the vocabulary (``WORDS``), or a text has more than 14 words.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = torch.full((len(texts), CONTEXT_LENGTH), PAD, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = _words(text)
        unknown = [word for word in words if word not in _IDS]
        if unknown:
            raise ValueError(
                f"texts: the mini world does not know the word {unknown[0]!r} of {text!r}; "
                "it knows the words in cl_methods.scenarios.mini.tokenizer.WORDS"
            )
        if len(words) > CONTEXT_LENGTH - 2:
            raise ValueError(f"texts: expected at most {CONTEXT_LENGTH - 2} words, got {len(words)} in {text!r}")
        tokens[row, : len(words) + 2] = torch.tensor([START, *(_IDS[word] for word in words), END])
    return tokens


def detokenize(tokens: Tensor) -> list[str]:
    """The words of token ids (N, L), without start, end and padding."""
    return [" ".join(WORDS[token - 2] for token in row if START < token < END) for row in tokens.tolist()]

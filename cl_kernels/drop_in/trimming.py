"""How much of a batch of texts a causal tower has to see."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_known = WeakIdKeyDictionary()


def read_length(tokens: Tensor, eos: int | None) -> int:
    """The number of leading positions up to the last one that is read.

    On a GPU the answer is kept for as long as the tensor lives and is not written to, because asking waits for the device.

    Args:
        tokens: (B, L) token ids.
        eos: texts are read where this id comes first; None: where the largest id comes first.
    """
    remembered = tokens.device.type != "cpu" and not tokens.is_inference()
    if remembered and tokens in _known:
        version, known_eos, length = _known[tokens]
        if (version, known_eos) == (tokens._version, eos):
            return length
    positions = tokens.argmax(dim=-1) if eos is None else (tokens == eos).int().argmax(dim=-1)
    length = int(positions.max()) + 1 if len(tokens) else tokens.shape[1]
    if remembered:
        _known[tokens] = tokens._version, eos, length
    return length

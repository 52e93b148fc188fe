"""What a frozen teacher sees of the reference data: texts as token ids, and image features computed once per image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.components.teacher_features import KeptBatches


def random_texts(backbone: Backbone, count: int = 1000, length: int = 10, seed: int = 0) -> Tensor:
    """Texts of random vocabulary entries between the start and the end token: token ids (count, context), int64, CPU.

    The same for the whole run and for every run with this ``seed``. Start and end ids are not drawn, so that every text is
    read at its end.

    Args:
        backbone: gives the vocabulary size and, through its tokenizer, the start and end ids.
        count, length: number of texts, and random tokens in each.
        seed: of the draw.

    Raises:
        ValueError: ``length`` does not fit into the context.

    Source: the LwF-VR baseline of ZSCL (Zheng et al., ICCV 2023).
    """
    empty = backbone.tokenize([""])[0]
    start, end, context = int(empty[0]), int(empty.max()), len(empty)
    if length + 2 > context:
        raise ValueError(f"length: expected at most {context - 2} tokens for a context of {context}, got {length}")
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(end + 1, dtype=torch.bool)
    allowed[[start, end, 0]] = False
    ids = allowed.nonzero().squeeze(1)
    tokens = torch.zeros(count, context, dtype=torch.int64)
    tokens[:, 0] = start
    tokens[:, 1 : length + 1] = ids[torch.randint(len(ids), (count, length), generator=generator)]
    tokens[:, length + 1] = end
    return tokens


class FrozenFeatures:
    """Features of a frozen encoder by image index, computed when an image is first met; exact as long as transforms are fixed.

    The cache is part of a method's state: a row depends on the batch that it was first computed in (matrix products round
    differently in other company), so a resumed run must not compute it again.

    Args:
        encode: (B, 3, R, R) -> (B, d), without gradient.
        device: where features are kept.
        kept: what earlier runs computed, in the same batches; None to compute everything.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], device: torch.device, kept: KeptBatches | None = None
    ) -> None:
        self._encode, self._device, self._kept = encode, device, kept
        self.clear()

    def clear(self) -> None:
        """Forget everything: the encoder or the images change."""
        self._rows: dict[int, int] = {}
        self._store: Tensor | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, images: Tensor, indices: Tensor | None) -> Tensor:
        """Features (B, d) of ``images`` (B, 3, R, R), whose positions in their source are ``indices`` (B,).

        Without indices nothing is cached.
        """
        if indices is None:
            return self._encode(images)
        keys = indices.tolist()
        missing = [position for position, key in enumerate(keys) if key not in self._rows]
        if missing:
            rows = [keys[position] for position in missing]
            self._append(rows, self._computed(rows, images if len(missing) == len(keys) else images[missing]))
        assert self._store is not None
        return self._store[torch.tensor([self._rows[key] for key in keys]).to(self._device, non_blocking=True)]

    def _computed(self, rows: list[int], images: Tensor) -> Tensor:
        if self._kept is None:
            return self._encode(images)
        return self._kept.get(rows, lambda: self._encode(images)).to(self._device)

    def _append(self, keys: list[int], features: Tensor) -> None:
        used = max(self._rows.values(), default=-1) + 1
        if self._store is None or used + len(keys) > len(self._store):
            grown = features.new_empty(max(2 * used, used + len(keys)), features.shape[1])
            if self._store is not None:
                grown[:used] = self._store[:used]
            self._store = grown
        self._store[used : used + len(keys)] = features
        self._rows.update({key: used + offset for offset, key in enumerate(keys)})

    def state_dict(self) -> dict[str, Tensor]:
        """``indices`` (n,) int64 and ``features`` (n, d); empty when nothing is cached."""
        if self._store is None:
            return {}
        rows = torch.tensor(list(self._rows.values())).to(self._device)
        return {"indices": torch.tensor(list(self._rows)), "features": self._store[rows]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self.clear()
        if state:
            self._append(state["indices"].tolist(), state["features"].to(self._device))

"""A batch of evaluation images: pixels that are read when somebody asks, and what frozen encoders make of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

PLAIN = "plain"
"""Name of the normalised features of the untouched CLIP image encoder."""


class ImageBatch:
    """Evaluation images (B, 3, R, R), with each of their frozen features computed at most once.

    This one lives as long as its pixels do. During a run, evaluation hands out batches whose pixels are not read before they
    are needed, and whose frozen features outlive them (:mod:`cl_methods.evaluation.features`).

    Args:
        pixels: (B, 3, R, R), evaluation transform.
    """

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self._frozen: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def pixels(self) -> Tensor:
        """The images (B, 3, R, R)."""
        return self._pixels

    def frozen(self, name: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """``encode(pixels)``, from memory if it is there: for encoders that give an image the same features all run long.

        The whole batch is encoded even where a method needs a few rows, so that a row never depends on which others did.

        Args:
            name: of the encoder; unique within a method.
            encode: images (B, 3, R, R) -> features (B, …). The result may be kept and must not be changed in place.
        """
        kept = self.kept(name)
        if kept is None:
            kept = encode(self.pixels())
            self.keep(name, kept)
        return kept

    def kept(self, name: str) -> Tensor | None:
        """What :meth:`keep` was given under ``name``, (B, …) on the device; None if it is not there."""
        return self._frozen.get(name)

    def keep(self, name: str, features: Tensor) -> None:
        """Keep ``features`` (B, …), which an encoder called ``name`` gives these images all run long."""
        self._frozen[name] = features

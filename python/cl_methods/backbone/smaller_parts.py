"""What to do where memory runs out in a pass without gradients: the same again, in parts of half the size."""

from __future__ import annotations

from dataclasses import replace

import torch

from cl_methods.backbone.micro_batches import MicroBatches

_NO_MEMORY = "can't allocate memory"
"""What torch says where the host has none left; a GPU that has none left raises a class of its own."""

_TEXTS = 1024
"""Texts that go through a tower together where nothing says how many."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a GPU had no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
    )


def halved(parts: MicroBatches | None, images: int) -> MicroBatches | None:
    """``parts`` with half as many samples where no gradient is needed; None if they are single samples already.

    Args:
        parts: as they were.
        images: of the batch that did not fit.
    """
    before = parts or MicroBatches()
    together = images if before.frozen_images is None else min(images, before.frozen_images)
    texts = before.frozen_texts or _TEXTS
    if together <= 1 and texts <= 1:
        return None
    return replace(before, frozen_images=max(1, together // 2), frozen_texts=max(1, texts // 2))

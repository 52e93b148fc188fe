"""Scoring where memory runs out: the same batch again, its images and texts going through the towers in smaller parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.backbone.smaller_parts import halved, is_out_of_memory

Result = TypeVar("Result")


class Parts:
    """How much goes through the towers together in all evaluations of a run: everything, until memory has run out once.

    A batch stays the batch that is scored, whatever the parts: what a method decides about a batch does not change, and features
    change by the rounding of smaller products at most.

    Args:
        note: told in one sentence when parts become smaller.
    """

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self.note = note
        self._parts: MicroBatches | None = None

    @contextmanager
    def within(self, backbone: Backbone) -> Iterator[None]:
        """Inside, ``backbone`` encodes in these parts where they are smaller than its own; afterwards as before."""
        before = backbone.micro_batches
        if self._parts is not None:
            backbone.micro_batches = self._parts
        try:
            yield
        finally:
            backbone.micro_batches = before

    def work(self, backbone: Backbone, images: int, score: Callable[[], Result]) -> Result:
        """``score()``; where memory runs out, again with parts of half the size, until it fits.

        Args:
            backbone: of the method, inside :meth:`within`.
            images: that are scored together.
            score: may be called several times.

        Raises:
            RuntimeError: memory runs out with single images too, or something else is wrong.
        """
        while True:
            try:
                return score()
            except (RuntimeError, MemoryError) as error:
                smaller = halved(backbone.micro_batches, images) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
            # outside of the handler, where nothing holds the failed attempt's tensors any more
            backbone.micro_batches = self._parts = smaller
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.note is not None:
                self.note(
                    f"evaluation: no memory for {images} images at once; they go on through the model "
                    f"{smaller.frozen_images} at a time (texts {smaller.frozen_texts}), which changes results by rounding at most"
                )

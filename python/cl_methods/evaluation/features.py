"""Frozen features of evaluation images, kept for as long as a run lasts, and pixels that are read only when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.loading import ImageReader
from cl_methods.evaluation.in_parts import Parts

_GIB = 1 << 30


class FeatureStore:
    """Features by encoder, source of images and batch, in host memory.

    An encoder's features are kept if those of all images fit beside what is kept already, and else not at all; then they
    are computed again in every row, which changes nothing but the time.

    Args:
        images: of all sources together.
        gibibytes: bound on what is kept.
        note: told once for each encoder whose features do not fit, and whenever batches must be encoded in smaller parts.

    Attributes:
        parts: in which batches are encoded.
    """

    def __init__(self, images: int, gibibytes: float, note: Callable[[str], None] | None = None) -> None:
        self.images, self.gibibytes, self.note = images, gibibytes, note
        self.parts = Parts(note)
        self._kept: dict[tuple[str, str, int], Tensor] = {}
        self._reserved: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """What the features that are there take."""
        return sum(value.numel() * value.element_size() for value in self._kept.values())

    def get(self, encoder: str, source: str, batch: int) -> Tensor | None:
        """Features (B, d) on the host, if they are there."""
        return self._kept.get((encoder, source, batch))

    def put(self, encoder: str, source: str, batch: int, features: Tensor) -> None:
        """Keep ``features`` (B, d) of a batch if there is room for all that this encoder will give."""
        if encoder not in self._reserved:
            self._reserve(encoder, math.prod(features.shape[1:]) * features.element_size())
        if self._reserved[encoder]:
            self._kept[encoder, source, batch] = features.detach().cpu()

    def _reserve(self, encoder: str, row: int) -> None:
        needed = self.images * row
        fits = needed + sum(self._reserved.values()) <= self.gibibytes * _GIB
        self._reserved[encoder] = needed if fits else 0
        if not fits and self.note is not None:
            self.note(
                f"evaluation.feature_memory: {self.gibibytes:g} GiB cannot hold the {encoder} features of {self.images:,} images "
                f"({needed / _GIB:.2g} GiB); they are computed again in every evaluation"
            )


class RowReader:
    """Pixels of the batches of a whole row of evaluations, from one reader that lives until :meth:`close`.

    Workers read ahead across the borders between tasks. A row of which nothing is asked starts and reads nothing.

    Args:
        reader: of the evaluated images of every task, made by a process :func:`~cl_methods.ranks.alone`: a batch is read whole by
            the process that scores it.
    """

    def __init__(self, reader: ImageReader) -> None:
        self.sources, self.batch_size = reader.sources, reader.batch_size
        self._reader = reader
        self.begin([])

    def begin(self, wanted: Sequence[tuple[int, int]]) -> None:
        """A row begins, of which these batches may be asked for, in this order: number of the source, number within it."""
        self._wanted = list(wanted)
        self._places = {key: place for place, key in enumerate(self._wanted)}
        self._pixels: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next = -1  # place of the batch that comes next; none has been asked for

    def read(self, source: int, number: int) -> Tensor:
        """Pixels (B, 3, R, R) of a batch.

        Raises:
            DataError: an image cannot be read.
        """
        place = self._places[source, number]
        ahead = place - self._next
        if self._next < 0 or ahead < 0 or ahead > self._reader.workers:  # far ahead nothing has been read
            self._pixels, self._next = self._reader.read(self._wanted[place:]), place
        for _ in range(place - self._next):
            next(self._pixels)
        self._next = place + 1
        return next(self._pixels)[0]

    def close(self) -> None:
        """End the worker processes."""
        self._pixels = iter(())
        self._reader.close()


class EvaluationImages:
    """Images of one task in batches; a batch reads its pixels when they are asked for, ahead of time if workers do it.

    All images, or the batches that are dealt to this process; it reads and encodes them :func:`~cl_methods.ranks.alone`, so that a
    row of features does not depend on how many processes there are.

    Args:
        reader: of the pixels, begun with a row that these batches are part of.
        number: of the source that is wanted among the reader's.
        name: by which the store knows the source.
        device: where labels and kept features go.
        store: of the features that outlive the batches.
        dealt: numbers of the batches that are wanted, ascending; None: all.
    """

    def __init__(
        self,
        reader: RowReader,
        number: int,
        *,
        name: str,
        device: torch.device,
        store: FeatureStore,
        dealt: Sequence[int] | None = None,
    ) -> None:
        self.reader, self.number, self.name, self.device, self.store = reader, number, name, device, store
        count = -(-len(reader.sources[number]) // reader.batch_size)
        self.batches = list(range(count) if dealt is None else dealt)

    def __iter__(self) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Batches and their labels (B,), in order, on the device."""
        every = self.reader.sources[self.number].labels.split(self.reader.batch_size)
        for batch in self.batches:
            labels = every[batch]
            yield _StoredBatch(self, batch, len(labels)), labels.to(self.device, non_blocking=True)

    def read(self, batch: int) -> Tensor:
        """Pixels (B, 3, R, R) of a batch.

        Raises:
            DataError: an image cannot be read.
        """
        return self.reader.read(self.number, batch)


class _StoredBatch(ImageBatch):
    def __init__(self, images: EvaluationImages, number: int, count: int) -> None:
        super().__init__(torch.empty(0))
        self._images, self._number, self._count = images, number, count
        self._read = False

    def __len__(self) -> int:
        return self._count

    @override
    def pixels(self) -> Tensor:
        if not self._read:
            self._pixels, self._read = self._images.read(self._number), True
        return self._pixels

    @override
    def kept(self, name: str) -> Tensor | None:
        found = super().kept(name)
        if found is None:
            stored = self._images.store.get(name, self._images.name, self._number)
            if stored is not None:
                found = stored.to(self._images.device, non_blocking=True)
                super().keep(name, found)
        return found

    @override
    def keep(self, name: str, features: Tensor) -> None:
        super().keep(name, features)
        self._images.store.put(name, self._images.name, self._number, features)

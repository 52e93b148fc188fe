"""Frozen features of evaluation images, kept for as long as a run lasts, and pixels that are read only when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.loading import Transform, evaluation_batches

_GIB = 1 << 30


class FeatureStore:
    """Features by encoder, source of images and batch, in host memory.

    An encoder's features are kept if those of all images fit beside what is kept already, and else not at all; then they
    are computed again in every row, which changes nothing but the time.

    Args:
        images: of all sources together.
        gibibytes: bound on what is kept.
        note: told once for each encoder whose features do not fit.
    """

    def __init__(self, images: int, gibibytes: float, note: Callable[[str], None] | None = None) -> None:
        self.images, self.gibibytes, self.note = images, gibibytes, note
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


class EvaluationImages:
    """Images of one task in batches; a batch reads its pixels when they are asked for, ahead of time if workers do it.

    All images, or the batches that are dealt to this process; it reads and encodes them :func:`~cl_methods.ranks.alone`, so that a
    row of features does not depend on how many processes there are.

    Args:
        source: the images.
        transform: their evaluation transform.
        name: by which the store knows the source.
        batch_size, device, workers: see :func:`~cl_methods.datasets.loading.evaluation_batches`.
        store: of the features that outlive the batches.
        dealt: numbers of the batches that are wanted, ascending; None: all.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        *,
        name: str,
        batch_size: int,
        device: torch.device,
        workers: int,
        store: FeatureStore,
        dealt: Sequence[int] | None = None,
    ) -> None:
        self.source, self.transform, self.name = source, transform, name
        self.batch_size, self.device, self.workers, self.store = batch_size, device, workers, store
        self.batches = list(range(-(-len(source) // batch_size)) if dealt is None else dealt)
        self._reader: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next = -1  # place in ``batches`` of the batch that the reader gives next

    def __iter__(self) -> Iterator[tuple[ImageBatch, Tensor]]:
        """Batches and their labels (B,), in order, on the device."""
        every = self.source.labels.split(self.batch_size)
        for number in self.batches:
            labels = every[number]
            yield _StoredBatch(self, number, len(labels)), labels.to(self.device, non_blocking=True)

    def read(self, number: int) -> Tensor:
        """Pixels (B, 3, R, R) of a batch; later batches are read from the same loader.

        Raises:
            DataError: an image cannot be read.
        """
        place = self.batches.index(number)
        if self._next < 0 or place < self._next or (self.workers == 0 and place > self._next):
            self._start(place)
        while self._next < place:  # what workers have read ahead
            next(self._reader)
            self._next += 1
        self._next += 1
        return next(self._reader)[0]

    def _start(self, place: int) -> None:
        """A loader of the batches from ``place`` on."""
        self._reader = evaluation_batches(
            self.source,
            self.transform,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            batches=self.batches[place:],
        )
        self._next = place


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
    def find(self, name: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        store, source = self._images.store, self._images.name
        kept = store.get(name, source, self._number)
        if kept is not None:
            return kept.to(self._images.device, non_blocking=True)
        features = encode(self.pixels())
        store.put(name, source, self._number, features)
        return features

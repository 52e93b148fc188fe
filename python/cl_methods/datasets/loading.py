"""Reading images in batches, in this process or in others, with errors that survive the way between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cl_methods import ranks
from cl_methods.datasets.copying import on_device
from cl_methods.datasets.image_cache import CachedImages
from cl_methods.datasets.images import DataError, ImageSource, RawImage
from cl_methods.datasets.two_stage import two_stage
from cl_methods.datasets.workers import leave_to_the_parent

Transform = Callable[[RawImage], Tensor]
_TOGETHER = 8
"""Images that are normalised together: few enough to stay in a core's cache."""


def read_images(source: ImageSource, indices: Sequence[int], transform: Transform) -> Tensor:
    """``transform(source.image(i))`` for every i, stacked; pixels from the cache where the source has one.

    Args:
        source: where the images are.
        indices: B positions in it.
        transform: of each image.

    Returns:
        (B, 3, R, R), the same to the bit with a cache and without.

    Raises:
        DataError: an image cannot be read.
    """
    stages = two_stage(transform)
    located = [source.locate(index) for index in indices] if stages is not None else []
    if stages is None or not all(isinstance(holder, CachedImages) for holder, _ in located):
        return torch.stack([transform(source.image(index)) for index in indices])
    pixels = [np.asarray(holder.pixels(place, stages)) for holder, place in located if isinstance(holder, CachedImages)]
    if stages.write_numbers is not None and len({one.shape for one in pixels}) == 1:
        images = torch.empty(len(pixels), *pixels[0].shape)
        for one, out in zip(pixels, images, strict=True):
            stages.write_numbers(one, out)
        return images
    first = stages.numbers(torch.from_numpy(np.stack(pixels[:_TOGETHER])))
    images = first.new_empty(len(pixels), *first.shape[1:])
    images[:_TOGETHER] = first
    for start in range(_TOGETHER, len(pixels), _TOGETHER):
        part = slice(start, start + _TOGETHER)
        images[part] = stages.numbers(torch.from_numpy(np.stack(pixels[part])))
    return images


def read_share(source: ImageSource, indices: Tensor, transform: Transform, share: range) -> Tensor:
    """:func:`read_images` of ``indices[share]``; (0, 3, R, R) for an empty share.

    Args:
        source: where the images are.
        indices: B >= 1 positions in it.
        transform: of each image.
        share: which of them this process reads.

    Raises:
        DataError: an image cannot be read.
    """
    some = share or range(1)  # an image tells the shape
    return read_images(source, indices[some.start : some.stop].tolist(), transform)[: len(share)]


def open_cache(source: ImageSource, transform: Transform) -> None:
    """Open what is kept of a source's images, so that worker processes that are started now find it open.

    Raises:
        DataError: nothing is kept yet, and the first image cannot be read.
    """
    stages = two_stage(transform)
    if stages is not None and len(source):
        holder, place = source.locate(0)
        if isinstance(holder, CachedImages):
            holder.prepare(place, stages)


class _InOrder(Dataset):
    """Item (s, b) is the b-th batch of the s-th source, in the source's order; of its pixels this process's share."""

    def __init__(self, sources: Sequence[ImageSource], transform: Transform, batch_size: int) -> None:
        self.sources, self.transform, self.batch_size = tuple(sources), transform, batch_size
        sizes = {batch_size, *(len(source) % batch_size for source in sources)}
        self.shares = {size: ranks.share(size) for size in sizes}  # worker processes know nothing of the others

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor] | DataError:
        source, batch = self.sources[place[0]], place[1]
        start, stop = batch * self.batch_size, min((batch + 1) * self.batch_size, len(source))
        try:
            images = read_share(source, torch.arange(start, stop), self.transform, self.shares[stop - start])
        except DataError as error:  # as a value, it crosses the process boundary with its message intact
            return error
        return {"images": images, "labels": source.labels[start:stop]}


class ImageReader:
    """Batches of several sources, read by one set of worker processes that lives until :meth:`close`.

    Processes start with the first batch, and find the sources as they are then.

    Args:
        sources, transform: images and what makes tensors of them.
        batch_size: images per batch.
        device, workers: where they go, and processes that read ahead; 0 reads here.

    Attributes:
        sources, batch_size, device, workers: as given.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        transform: Transform,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self.sources, self.batch_size, self.device, self.workers = tuple(sources), batch_size, device, workers
        self._batches: _InOrder | None = _InOrder(sources, transform, batch_size)
        self._items: Items | None = None

    def read(self, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``wanted``, each as number of its source and number within it; an earlier call's are given up.

        Returns:
            Pairs of images (B, 3, R, R) and labels (B,) on the device; where several processes compute together, each reads its
            share of every batch.

        Raises:
            DataError: an image cannot be read.
            ValueError: the reader is closed.
        """
        if self._batches is None:
            raise ValueError("read: expected a reader that is open, got one after close()")
        if self._items is None:
            for source in self._batches.sources:
                open_cache(source, self._batches.transform)
            self._items = Items(self._batches, self.device, self.workers)
        return self._pairs(self._items.read(wanted))

    def _pairs(self, items: Iterator[dict[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for data in on_device(items, self.device):
            yield ranks.gather_rows(data["images"], len(data["labels"])), data["labels"]

    def close(self) -> None:
        """End the worker processes."""
        self._batches = self._items = None


def evaluation_batches(
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    batches: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``source`` once, in order; where several processes compute together, each reads its share of every batch.

    Args:
        source, transform: images and what makes tensors of them.
        batch_size: images per batch.
        device, workers: where they go, and processes that read ahead.
        batches: numbers of the batches that are wanted; None: all.

    Returns:
        Pairs of images (B, 3, R, R) and labels (B,) on ``device``; the last batch may be smaller.

    Raises:
        DataError: an image cannot be read.
    """
    reader = ImageReader([source], transform, batch_size=batch_size, device=device, workers=workers)
    wanted = range(-(-len(source) // batch_size)) if batches is None else batches
    yield from reader.read([(0, number) for number in wanted])


class Items:
    """Items of a dataset in any order, again and again, read ahead by one set of worker processes.

    The processes start with the first item and end with this object.

    Args:
        dataset: gives dictionaries of tensors, or a :class:`DataError` that is raised when its turn comes.
        device: where the tensors will go; those for a GPU lie in pinned memory.
        workers: processes; 0 reads here.
    """

    def __init__(self, dataset: Dataset, device: torch.device, workers: int) -> None:
        self._dataset, self._order = dataset, _Order()
        self._loader: DataLoader | None = None
        if workers > 0:  # without them no loader in between: it would copy
            self._loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=self._order,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                prefetch_factor=4,
                worker_init_fn=leave_to_the_parent,
                persistent_workers=True,
                generator=torch.Generator(),  # the loader would draw from the global one
            )

    def read(self, order: Sequence[Any]) -> Iterator[dict[str, Tensor]]:
        """The items of ``order``; what an earlier call has not given yet is given up.

        Raises:
            DataError: an item is one.
        """
        if self._loader is None:
            for key in order:
                yield _data(self._dataset[key])
            return
        self._order.keys = order
        for item in self._loader:
            yield _data(item)


class _Order(Sampler):
    """The keys that the loader asks for next."""

    def __init__(self) -> None:
        self.keys: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _data(item: dict[str, Tensor] | DataError) -> dict[str, Tensor]:
    if isinstance(item, DataError):
        raise item
    return item

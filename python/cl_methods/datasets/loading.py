"""Reading images in batches, in this process or in others, with errors that survive the way between them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_methods import ranks
from cl_methods.datasets.image_cache import CachedImages
from cl_methods.datasets.images import DataError, ImageSource, RawImage
from cl_methods.datasets.two_stage import two_stage

Transform = Callable[[RawImage], Tensor]
_SECONDS_AFTER_SIGTERM = 60
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
    """Item b is the b-th batch of a source, in the source's order; of its pixels this process's share."""

    def __init__(self, source: ImageSource, transform: Transform, batch_size: int) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size
        self.shares = {size: ranks.share(size) for size in {batch_size, len(source) % batch_size}}

    def __getitem__(self, batch: int) -> dict[str, Tensor] | DataError:
        start, stop = batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.source))
        try:
            images = read_share(self.source, torch.arange(start, stop), self.transform, self.shares[stop - start])
        except DataError as error:
            return error
        return {"images": images, "labels": self.source.labels[start:stop]}


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
    open_cache(source, transform)
    wanted = range(-(-len(source) // batch_size)) if batches is None else batches
    for data in load_items(_InOrder(source, transform, batch_size), wanted, device, workers):
        labels = data["labels"].to(device, non_blocking=True)
        yield ranks.gather_rows(data["images"].to(device, non_blocking=True), len(labels)), labels


def load_items(
    dataset: Dataset, order: Sequence[int], device: torch.device, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Items of a dataset in the given order, read ahead by one set of worker processes (0: read here).

    An item is a dictionary of tensors, or a :class:`DataError` that is raised when its turn comes.
    """
    if workers == 0:  # no loader in between: it would draw from the global generator and copy
        for index in order:
            yield _data(dataset[index])
        return
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for item in loader:
        yield _data(item)


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and batch systems reach worker processes too, but the parent decides when these end.

    After SIGTERM a worker lives on for a minute at most, so that one that hangs does not stay for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(_SECONDS_AFTER_SIGTERM)


def _data(item: dict[str, Tensor] | DataError) -> dict[str, Tensor]:
    if isinstance(item, DataError):
        raise item
    return item

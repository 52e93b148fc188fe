"""Reading images in batches, in this process or in others, with errors that survive the way between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_methods.datasets.images import DataError, ImageSource, RawImage

Transform = Callable[[RawImage], Tensor]


class _InOrder(Dataset):
    """Item b is the b-th batch of a source, in the source's order."""

    def __init__(self, source: ImageSource, transform: Transform, batch_size: int) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size

    def __getitem__(self, batch: int) -> dict[str, Tensor] | DataError:
        indices = range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.source)))
        try:
            images = [self.transform(self.source.image(index)) for index in indices]
        except DataError as error:
            return error
        return {"images": torch.stack(images), "labels": self.source.labels[indices.start : indices.stop]}


def evaluation_batches(
    source: ImageSource, transform: Transform, *, batch_size: int, device: torch.device, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of ``source`` once, in order.

    Returns:
        Pairs of images (B, 3, R, R) and labels (B,) on ``device``; the last batch may be smaller.

    Raises:
        DataError: an image cannot be read.
    """
    count = -(-len(source) // batch_size)
    for data in load_items(_InOrder(source, transform, batch_size), range(count), device, workers):
        yield data["images"].to(device, non_blocking=True), data["labels"].to(device, non_blocking=True)


def load_items(dataset: Dataset, order: range, device: torch.device, workers: int) -> Iterator[dict[str, Tensor]]:
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
    )
    for item in loader:
        yield _data(item)


def _data(item: dict[str, Tensor] | DataError) -> dict[str, Tensor]:
    if isinstance(item, DataError):
        raise item
    return item

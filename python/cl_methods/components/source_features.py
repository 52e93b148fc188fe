"""Features of every image of a source, in one pass whose batches are dealt out to the processes that compute together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.loading import Transform, evaluation_batches


def source_features(
    encode: Callable[[Tensor], Tensor],
    source: ImageSource,
    transform: Transform,
    *,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """``encode`` of every image of ``source``, in order; the same numbers however many processes there are.

    Args:
        encode: (B, 3, R, R) -> (B, d), without gradient, and each row from its own image alone.
        source: N >= 1 images.
        transform: of each image.
        batch_size: images that are encoded together.
        device: where the images go and the features are.

    Returns:
        (N, d).

    Raises:
        DataError: an image cannot be read.
    """
    numbers = ranks.dealt(-(-len(source) // batch_size))
    with ranks.alone():
        batches = evaluation_batches(source, transform, batch_size=batch_size, device=device, batches=numbers)
        found = [encode(images) for images, _ in batches]
    if ranks.count() == 1:
        return torch.cat(found)
    widths = ranks.gather_values((found[0].shape[1], found[0].dtype) if found else None)
    width, dtype = next(known for known in widths if known is not None)
    every = torch.zeros(len(source), width, dtype=dtype, device=device)
    for number, features in zip(numbers, found, strict=True):
        every[number * batch_size : number * batch_size + len(features)] = features
    ranks.sum_([every])  # every row has one addend that is not zero
    return every

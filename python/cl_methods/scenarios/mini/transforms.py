"""From raw images to what the tiny model reads."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from cl_methods.datasets.two_stage import TwoStage

MEAN, STD = 0.5, 0.28
MAX_SHIFT = 2


def _pixels(image: Image.Image | Tensor) -> Tensor:
    if isinstance(image, Image.Image):
        resized = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    if image.dtype != torch.uint8 or image.shape[-3:] != (3, 32, 32):
        raise ValueError(
            f"image: expected a PIL image or uint8 (..., 3, 32, 32), got {image.dtype} {tuple(image.shape)}"
        )
    return image


def _numbers(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255.0 - MEAN) / STD


eval_transform = TwoStage(_pixels, _numbers, "mini: 32 x 32, bicubic", f"mini: (p / 255 - {MEAN}) / {STD}")
"""Float32 (..., 3, 32, 32), ``(pixel / 255 - 0.5) / 0.28``, from uint8 of the same shape or a PIL image; ``ValueError`` for a
tensor that is not uint8 (..., 3, 32, 32)."""


def train_transform(image: Image.Image | Tensor) -> Tensor:
    """:func:`eval_transform` of the image moved by up to two pixels along each axis, the border repeated.

    The shift comes from torch's global generator; one for the whole of a batch.
    """
    down, right = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    moved = eval_transform(image)
    flat = pad(moved.reshape(-1, *moved.shape[-2:]), (MAX_SHIFT,) * 4, mode="replicate")
    return flat[:, down : down + 32, right : right + 32].reshape(moved.shape)

"""The image transforms of the published runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_methods.torchvision_compat import prepare_torchvision

prepare_torchvision()

Transform = Callable[[Any], Tensor]


def image_transforms(config: dict[str, Any]) -> tuple[Transform, Transform]:
    """(training, evaluation) transforms: PIL image or uint8 (3, H, W) tensor -> float32 (3, R, R).

    Training crops 90-100 % of the area at random and never flips; evaluation resizes the short side and crops the centre.

    Args:
        config: ``size``, ``mean``, ``std``, ``interpolation`` as open_clip keeps them.
    """
    from torchvision.transforms import InterpolationMode, v2

    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    mode = InterpolationMode(config.get("interpolation") or "bicubic")
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
        v2.ToPureTensor(),
    ]
    train = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=mode, antialias=True)
    evaluate = [v2.Resize(size, interpolation=mode, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([train, *to_tensor]), v2.Compose([*evaluate, *to_tensor])

"""Features of frozen networks by which data sets can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_methods.backbone import Backbone


@dataclass(frozen=True)
class Extractor:
    """Images (B, 3, R, R) -> features (B, D).

    Attributes:
        features: the function.
        standardise: whether features need shift and scale before a sigmoid.
        width: D, where it is known before an image has been seen.
    """

    features: Callable[[Tensor], Tensor]
    standardise: bool
    width: int | None = None


def alexnet_features(weights: str, device: torch.device) -> Extractor:
    """Flattened conv5 output of torchvision's AlexNet before the ReLU: 256 x 13 x 13 = 43,264 numbers for 224² images.

    Args:
        weights: path of its state dict (``alexnet-owt-7be5be79.pth`` in torchvision's naming).
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not weights or not Path(weights).is_file():
        raise FileNotFoundError(
            f"alexnet_weights: expected the path of torchvision's AlexNet weights (ImageNet), got {weights!r}; "
            "or set features='backbone', which needs none"
        )
    from torchvision.models import alexnet

    network = alexnet()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    layers = network.features[:-2].to(device).eval().requires_grad_(False)
    return Extractor(lambda images: layers(images).flatten(1), standardise=False)


def backbone_features(backbone: Backbone, depth: int) -> Extractor:
    """Mean and standard deviation over patches of the image tower's tokens before block ``depth``: D = 2 x width.

    Early statistics carry style, texture and noise, which tell data sets apart better than what an image shows.

    Args:
        backbone: a vision transformer of open_clip.
        depth: blocks to run; 0 is the patch embedding.

    Raises:
        TypeError: the image tower is no open_clip vision transformer.
        ValueError: it has fewer blocks.
    """
    visual: Any = backbone.model.visual
    if not hasattr(visual, "_embeds") or not hasattr(getattr(visual, "transformer", None), "resblocks"):
        raise TypeError(f"features: 'backbone' needs an open_clip vision transformer, {backbone.name} has none")
    blocks = visual.transformer.resblocks
    if not 0 <= depth <= len(blocks):
        raise ValueError(f"depth: expected 0 to {len(blocks)}, got {depth}")

    def features(images: Tensor) -> Tensor:
        x = visual._embeds(images)
        for block in blocks[:depth]:
            x = block(x)
        patches = x[:, 1:]
        return torch.cat([patches.mean(dim=1), patches.std(dim=1)], dim=1)

    return Extractor(features, standardise=True, width=2 * visual.class_embedding.shape[-1])

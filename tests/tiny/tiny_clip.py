"""A tiny CLIP with a letter-pair tokenizer and images of coloured noise: everything a method needs, in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.datasets.images import TensorImages

import open_clip  # isort: skip  # after cl_methods.backbone.model, which prepares torchvision

CONTEXT, END = 12, 99


def tokenize(texts: Sequence[str]) -> Tensor:
    """One id per letter pair, between start 1 and end 99, padded with 0."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = [2 + sum(map(ord, text[place : place + 2])) % 90 for place in range(0, len(text), 2)]
        ids = [1, *ids[: CONTEXT - 2], END]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


def tokenize_whole(texts: Sequence[str]) -> Tensor:
    """Ids that depend on the whole of each text, however long: no two classes of a long prompt are the same to the model."""
    rows = [[2 + value % 90 for value in hashlib.sha256(text.encode()).digest()[: CONTEXT - 2]] for text in texts]
    return torch.tensor([[1, *row, END] for row in rows], dtype=torch.int64)


def transform(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def build_model(**text: Any) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": CONTEXT, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2, **text},
    ).eval()


def build_backbone(**text: Any) -> Backbone:
    return Backbone(build_model(**text), tokenize, transform, transform, name="tiny")


def noise_images(count: int, seed: int, classes: int, brightness: int = 128) -> TensorImages:
    """Noise around a brightness; redder with the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (count, 3, 16, 16), generator=generator) + brightness - 40
    labels = torch.arange(count) % classes
    images[:, 0] += 20 * labels[:, None, None]
    return TensorImages(images.clamp(0, 255).to(torch.uint8), labels)

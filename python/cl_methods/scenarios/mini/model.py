"""The tiny CLIP of the mini world: open_clip's own model with a small convolutional stem in place of the patch projection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn

from cl_methods import lazy_open_clip
from cl_methods.scenarios.mini.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE

if TYPE_CHECKING:
    from open_clip.model import CLIP

IMAGE_SIZE = 32
EMBEDDING = 96
VISION_WIDTH, VISION_LAYERS, VISION_HEAD_WIDTH = 96, 3, 32
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 64, 2, 2
STEM = ((24, 2), (32, 1), (64, 2), (64, 1))
"""Output channels and stride of the stem's convolutions before the last."""
CHECKPOINT = Path(__file__).parent / "mini-v1.safetensors"

__all__ = ["CHECKPOINT", "build_model", "load_model"]


def _stem() -> nn.Sequential:
    """(B, 3, 32, 32) to (B, width, 4, 4): five 3 x 3 convolutions, three of them strided, group-normalised in between."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in STEM:
        convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(width // 8, width), nn.GELU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, VISION_WIDTH, 3, stride=2, padding=1, bias=False))


def build_model() -> CLIP:
    """The untrained model, float32; initial values come from torch's global generator.

    Its state-dict names are open_clip's, except that ``visual.conv1`` is a stem with ``visual.conv1.N.*``.
    """
    vision = lazy_open_clip.model.CLIPVisionCfg(
        layers=VISION_LAYERS, width=VISION_WIDTH, head_width=VISION_HEAD_WIDTH, patch_size=8, image_size=IMAGE_SIZE
    )
    text = lazy_open_clip.model.CLIPTextCfg(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCABULARY_SIZE,
        width=TEXT_WIDTH,
        heads=TEXT_HEADS,
        layers=TEXT_LAYERS,
    )
    model: CLIP = lazy_open_clip.model.CLIP(EMBEDDING, vision, text)
    model.visual.conv1 = _stem()
    return model


def load_model(checkpoint: Path = CHECKPOINT) -> CLIP:
    """The pre-trained model on the CPU, float32, in evaluation mode.

    Raises:
        FileNotFoundError: the checkpoint is missing; the message names the command that makes it.
        RuntimeError: the checkpoint is of another architecture.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} is missing; `python -m cl_methods.scenarios.mini.pretrain` makes it")
    with torch.random.fork_rng(devices=[]):
        model = build_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(checkpoint).items()})
    return model.eval()

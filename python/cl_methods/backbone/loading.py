"""A backbone by its name: the embedded tiny model, or any open_clip model with weights on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from cl_methods.backbone.model import Backbone
from cl_methods.weights import WeightsOrigin, file_sha256, fingerprint

MINI_WEIGHTS = "mini_model.safetensors"
"""File of a folder with weights of the embedded tiny model's architecture, which no configuration of open_clip describes."""


def load_backbone(model: str, pretrained: str | None = None, *, device: str | torch.device = "cpu") -> Backbone:
    """The embedded tiny model (``"mini"``), or any open_clip model with weights on disk.

    Training images are cropped at random (90-100 % of the area, bicubic, no flip); evaluation images are resized and
    centre-cropped: the transforms of the published MTIL runs.

    Args:
        model: ``"mini"``, or an open_clip name such as ``"ViT-B-16-quickgelu"``, or ``"local-dir:PATH"``, a folder such as
            ``clk export`` writes.
        pretrained: path of a file in any form that :func:`cl_methods.weights.read_weights` reads, or an open_clip tag.
            None: only with ``"mini"`` and ``"local-dir:"``, which bring their weights.
        device: where to put the model.

    Raises:
        ValueError: the model's name is unknown, or weights are needed and not named; they do not fit the model, or were
            trained with another activation than it has.
        FileNotFoundError: the weights are neither on disk nor can they be downloaded.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if model == "mini" or (model.startswith("local-dir:") and (folder / MINI_WEIGHTS).is_file()):
        if pretrained is not None:
            raise ValueError(f"pretrained: {model!r} brings its own weights; got {pretrained!r}")
        from cl_methods.scenarios import mini

        network = mini.load_model() if model == "mini" else mini.load_model(folder / MINI_WEIGHTS)
        file = mini.CHECKPOINT if model == "mini" else folder / MINI_WEIGHTS
        origin = WeightsOrigin(
            model=model,
            source="embedded" if model == "mini" else str(file),
            form="safetensors",
            sha256=file_sha256(file),
            fingerprint=fingerprint(network.state_dict()),
            activation="GELU",
        )
        parts = network, mini.tokenize, mini.train_transform, mini.eval_transform
        return Backbone(*parts, name=model, device=device, origin=origin)
    from cl_methods.backbone.open_clip_loading import load_open_clip

    loaded, origin = load_open_clip(model, pretrained)
    return Backbone(*loaded, name=model, device=device, origin=origin)


def planned_weights(model: str, pretrained: str | None) -> str:
    """One line about the weights that :func:`load_backbone` would load: of those on disk where they come from, after loading them.

    Raises:
        ValueError, FileNotFoundError: as there, for what is on disk; a tag is not looked for, so that nothing is downloaded.
    """
    if pretrained is not None and model != "mini" and not Path(pretrained).is_file():
        from cl_methods.backbone.open_clip_loading import check_tag

        check_tag(model, pretrained)
        return f"weights of {model}: tag {pretrained!r} of open_clip, downloaded unless they are on disk"
    origin = load_backbone(model, pretrained).origin
    assert origin is not None
    return origin.sentence()

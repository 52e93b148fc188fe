"""Exporting a run, an adapter file, or a checkpoint of public code: which of the files that :mod:`.files` writes it becomes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cl_methods.backbone import Backbone, load_backbone
from cl_methods.backbone.open_clip_loading import loaded_from
from cl_methods.methods.base import Method
from cl_methods.methods.find import named_in_data
from cl_methods.methods.moe_adapters import MoEAdapters
from cl_methods.methods.moe_adapters_config import MoEAdaptersConfig
from cl_methods.methods.settings import build_settings
from cl_methods.training.export.files import clip_part, write_adapter, write_model
from cl_methods.training.export.learnt import Adapter, ExportError, read_learnt
from cl_methods.weights import WeightsFile, activation, moe_adapters4cl, read_weights

_SCORING = (
    "logits",
    "scores",
    "image_features",
    "feature_scores",
    "classifier",
    "embed_classes",
    "before_evaluation",
)
"""What a method overrides if more than its CLIP decides how images are scored."""
_UNNAMED = "task {}"
"""The public code does not store the names of tasks."""
_HEAD_WIDTH, _BOTTLENECK, _SCALE = 64, 64, 0.1
"""What the public code of MoE-Adapters has no setting for."""


def export_run(
    source: Path, folder: Path, task: int | None = None, pretrained: str | None = None, *, with_model: bool = False
) -> list[str]:
    """Write what a run has learnt: its CLIP if that is all that scores images, else an adapter file.

    Args:
        source: directory of the run, or folder of an adapter file.
        folder: exists and is empty.
        task: 1-based, after which task; None for the last one.
        pretrained: the weights that the run started from, if they lie elsewhere now.
        with_model: write the frozen CLIP beside an adapter file too.

    Returns:
        Names of the files written.

    Raises:
        ExportError: there is nothing to export, or the weights that the run started from have changed.
    """
    adapter, state, backbone = _read(source, task, pretrained)
    weights = clip_part(state, backbone)
    scored_by_clip_alone = _scored_by_clip_alone(named_in_data(adapter.method, source))
    if scored_by_clip_alone and weights.keys() == backbone.model.state_dict().keys():
        return write_model(folder, backbone, weights, adapter.source)
    written = write_adapter(folder, adapter, state)
    return written + (write_model(folder, backbone, backbone.model.state_dict(), adapter.source) if with_model else [])


def export_file(
    source: Path, folder: Path, model: str, detector: Path | None, frozen: Path | None, *, with_model: bool = False
) -> list[str]:
    """Write a checkpoint of public code as what a run of ours would have become.

    Args:
        source: file in any form that :func:`cl_methods.weights.read_weights` reads.
        folder: exists and is empty.
        model: open_clip name of the architecture.
        detector: list of autoencoders, for a checkpoint of MoE-Adapters.
        frozen: list of frozen experts, for a checkpoint of MoE-Adapters.
        with_model: write the frozen CLIP beside an adapter file too.

    Returns:
        Names of the files written.

    Raises:
        ExportError: a checkpoint of MoE-Adapters with a router per task comes without its detector, or another with one; names
            of its tensors are unknown or missing.
        ValueError: the file does not fit the model.
    """
    file = read_weights(source)
    if not moe_adapters4cl.recognised(file.state):
        for name, given in (("detector", detector), ("frozen", frozen)):
            if given is not None:
                raise ExportError(f"{name}: {source} holds no adapters of MoE-Adapters, so {given} cannot belong to it")
        backbone = _backbone(model, file)
        return write_model(folder, backbone, backbone.model.state_dict(), source.name)
    try:
        public = moe_adapters4cl.from_public(file.state, frozen.read_text().splitlines() if frozen is not None else ())
    except ValueError as error:
        raise ExportError(f"{source}: {error}") from error
    backbone = _backbone(model, dataclasses.replace(file, state=public.clip))
    assert backbone.origin is not None
    state = {f"adapters.{name}": value for name, value in public.adapters.items()}
    per_task = public.settings["routers"] == "task"
    if per_task and detector is None:
        raise ExportError(
            f"detector: {source} has a router for each of {public.tasks} tasks, and which one an image takes is in the public "
            "code's list of autoencoders; give it with --detector (…_autochooser.pth)"
        )
    if detector is not None:
        try:
            coders = moe_adapters4cl.detector_from_public(read_weights(detector).state, public.tasks)
        except ValueError as error:
            raise ExportError(f"detector: {detector}: {error}") from error
        state |= {f"ddas.{name}": value for name, value in coders.items()}
    settings = {**public.settings, "detection": "ddas" if per_task else "none"}
    adapter = Adapter(
        method=MoEAdapters.name,
        settings=settings,
        model=model,
        pretrained=None,
        base_fingerprint=backbone.origin.fingerprint,
        seed=0,
        tasks=[_UNNAMED.format(number + 1) for number in range(public.tasks)],
        source=source.name,
    )
    written = write_adapter(folder, adapter, state)
    return written + (write_model(folder, backbone, backbone.model.state_dict(), source.name) if with_model else [])


def export_public(source: Path, folder: Path, task: int | None = None, pretrained: str | None = None) -> list[str]:
    """Write a run of ``moe_adapters`` as its public code stores it: model, list of autoencoders, list of frozen experts.

    Args:
        source: directory of the run, or folder of an adapter file.
        folder: exists and is empty.
        task: 1-based, after which task; None for the last one.
        pretrained: the weights that the run started from, if they lie elsewhere now.

    Returns:
        Names of the files written.

    Raises:
        ExportError: another method, or settings or an architecture that the public code does not have.
    """
    adapter, state, backbone = _read(source, task, pretrained)
    if adapter.method != MoEAdapters.name:
        raise ExportError(f"source: moe-adapters4cl is the form of moe_adapters, {source} is a run of {adapter.method}")
    settings = build_settings(MoEAdaptersConfig, adapter.settings)
    clip = backbone.model.state_dict()
    _check_public(settings, backbone, clip)
    adapters = {name.removeprefix("adapters."): v for name, v in state.items() if name.startswith("adapters.")}
    factor = settings.scale / _SCALE
    if factor != 1:
        adapters = {name: v * factor if ".up_" in name else v for name, v in adapters.items()}
    unnamed = not adapter.tasks or adapter.tasks[-1] == _UNNAMED.format(len(adapter.tasks))
    name = "model" if unnamed else adapter.tasks[-1]
    public = moe_adapters4cl.to_public(clip, adapters, shared=settings.routers == "shared")
    torch.save({"state_dict": {key: value.cpu() for key, value in public.items()}}, folder / f"{name}.pth")
    written = [f"{name}.pth"]
    coders = {key.removeprefix("ddas."): v for key, v in state.items() if key.startswith("ddas.")}
    if coders and settings.ddas.features != "alexnet":
        warnings.warn(
            f"{source}: its detector reads features of the backbone; the public code knows AlexNet's only, so its list of "
            "autoencoders is not written",
            stacklevel=2,
        )
    elif coders:
        torch.save({"state_dict": moe_adapters4cl.detector_to_public(coders)}, folder / f"{name}_autochooser.pth")
        written.append(f"{name}_autochooser.pth")
    (folder / "frozen.txt").write_text("".join(f"{line}\n" for line in moe_adapters4cl.frozen_lines(adapters)))
    return [*written, "frozen.txt"]


def _read(source: Path, task: int | None, pretrained: str | None) -> tuple[Adapter, dict[str, Tensor], Backbone]:
    """Configuration, tensors and the backbone that they belong to, with the weights that the run started from."""
    adapter, state = read_learnt(source, task)
    backbone = load_backbone(adapter.model, pretrained or adapter.pretrained)
    found = backbone.origin.fingerprint if backbone.origin is not None else None
    if adapter.base_fingerprint is not None and found != adapter.base_fingerprint:
        raise ExportError(
            f"pretrained: {source} started from weights with fingerprint {adapter.base_fingerprint[:12]}, "
            f"{pretrained or adapter.pretrained or adapter.model} now has {str(found)[:12]}; give the file with --pretrained"
        )
    return dataclasses.replace(adapter, base_fingerprint=found), state, backbone


def _backbone(model: str, file: WeightsFile) -> Backbone:
    parts, origin = loaded_from(model, file)
    return Backbone(*parts, name=model, origin=origin)


def _scored_by_clip_alone(method: type[Method]) -> bool:
    """Whether images are scored by the model's own features and prompts, as in the base class."""
    return all(getattr(method, name) is getattr(Method, name) for name in _SCORING)


def _check_public(settings: MoEAdaptersConfig, backbone: Backbone, clip: Mapping[str, Tensor]) -> None:
    """What the public code has no setting for, and would therefore compute otherwise without an error."""
    problems = []
    if activation.of_model(backbone.model) != activation.QUICK:
        problems.append(f"it computes QuickGELU, {backbone.name} uses GELU")
    if settings.bottleneck != _BOTTLENECK:
        problems.append(f"its experts are {_BOTTLENECK} wide, these {settings.bottleneck}")
    if settings.detection == "density":
        problems.append("it has no densities for a detector")
    if any(name.startswith("text.") for name in clip):
        problems.append("it knows OpenAI's text tower only")
    for tower, module in (("image", backbone.model.visual), ("text", backbone.text_tower)):
        blocks = getattr(getattr(module, "transformer", None), "resblocks", ())
        widths = {block.attn.embed_dim // block.attn.num_heads for block in blocks}
        if widths != {_HEAD_WIDTH}:
            problems.append(f"its heads are {_HEAD_WIDTH} wide, those of the {tower} tower {sorted(widths)}")
    if problems:
        raise ExportError(f"layout: the public code cannot run this model: {'; '.join(problems)}")

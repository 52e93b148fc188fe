"""open_clip models with weights on disk, with their tokenizers and transforms."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods import lazy_open_clip
from cl_methods.backbone.transforms import Transform, image_transforms
from cl_methods.weights import (
    WeightsError,
    WeightsFile,
    WeightsOrigin,
    activation,
    file_sha256,
    fingerprint,
    read_weights,
)
from cl_methods.weights.activation import read_json

_LOCAL = "local-dir:"
_BIG_VISION = (".npz", ".npy")
_FOLDER_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_LISTED = 6

Parts = tuple[nn.Module, Callable[[Sequence[str]], Tensor], Transform, Transform]
"""Network, tokenizer, training transform, evaluation transform."""


def load_open_clip(model: str, pretrained: str | None) -> tuple[Parts, WeightsOrigin]:
    """An open_clip model with its tokenizer and transforms, and where its weights come from.

    Args:
        model: open_clip name, or ``"local-dir:PATH"`` (configuration and weights in one folder).
        pretrained: path of a file in any form that :func:`cl_methods.weights.read_weights` reads, or an open_clip tag.

    Raises:
        ValueError: the name is unknown, or weights are needed and not named, or are named for a folder that brings its own;
            they do not fit the model, or were trained with another activation than it has.
        FileNotFoundError: the weights are neither on disk nor can they be downloaded.
    """
    if model.startswith(_LOCAL):
        if pretrained is not None:
            raise ValueError(f"pretrained: {model} brings its own weights; got {pretrained!r}")
        network, origin = _from_folder(model)
    else:
        _check_name(model)
        if pretrained is None:
            raise ValueError(f"pretrained: {model} needs weights; give the path of a checkpoint, or an open_clip tag")
        network, origin = (
            _from_file(model, Path(pretrained)) if Path(pretrained).is_file() else _tagged(model, pretrained)
        )
    return _parts(model, network), origin


def untrained_open_clip(model: str, device: str = "cpu") -> Parts:
    """The same with random weights: for counting and timing, which do not need trained ones.

    Args:
        model: open_clip name.
        device: ``"meta"`` for shapes without memory.

    Raises:
        ValueError: the name is unknown.
    """
    if device == "meta":  # open_clip would make the weights first, ten gigabytes of a large model's
        return shapes_of_open_clip(model)
    _check_name(model)
    return _parts(model, _untrained(model, device=device))


def shapes_of_open_clip(model: str) -> Parts:
    """The same with weights on the meta device: shapes alone, which take no memory.

    Raises:
        ValueError: the name is unknown.
    """
    _check_name(model)
    with torch.device("meta"):
        network = _untrained(model, device="meta")
        text = lazy_open_clip.library.get_model_config(model)["text_cfg"]
        return _parts(model, network, _Padded(network) if "hf_tokenizer_name" in text else None)


class _Padded:
    """In the place of a tokenizer of the Hugging Face hub, where only shapes count: it pads to the full context."""

    def __init__(self, network: Any) -> None:
        self._length = network.context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), self._length, dtype=torch.int64)


def _untrained(model: str, **options: Any) -> nn.Module:
    """Without pretrained weights.

    Raises:
        ValueError: its text tower is one of the Hugging Face hub, and cannot be had.
    """
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # that the weights are random is the point here
    try:
        return lazy_open_clip.library.create_model(model, pretrained_text=False, **options)
    except (RuntimeError, OSError) as error:
        hub = lazy_open_clip.library.get_model_config(model)["text_cfg"].get("hf_model_name")
        if hub is None:
            raise
        raise ValueError(
            f"model: the text tower of {model} is {hub} of the Hugging Face hub, which says how it is built; it needs the package "
            f"transformers and that file, online or in its cache ({error})"
        ) from error
    finally:
        logger.setLevel(level)


def _check_name(model: str) -> None:
    if lazy_open_clip.library.get_model_config(model) is None:
        raise ValueError(f"model: expected 'mini' or one of open_clip.list_models(), got {model!r}")


def _parts(model: str, network: nn.Module, tokenizer: Callable[[Sequence[str]], Tensor] | None = None) -> Parts:
    return (
        network,
        tokenizer or lazy_open_clip.library.get_tokenizer(model),
        *image_transforms(lazy_open_clip.library.get_model_preprocess_cfg(network)),
    )


def _from_file(model: str, path: Path) -> tuple[nn.Module, WeightsOrigin]:
    if path.suffix in _BIG_VISION:  # arrays of JAX, which open_clip knows how to name
        network = lazy_open_clip.library.create_model(model, pretrained=str(path))
        return network, _origin(model, str(path), "arrays of big_vision", file_sha256(path), network)
    return _from_weights(model, read_weights(path))


def loaded_from(model: str, file: WeightsFile) -> tuple[Parts, WeightsOrigin]:
    """:func:`load_open_clip` of tensors that have been read already.

    Raises:
        ValueError: the name is unknown; the weights do not fit it, or were trained with another activation than it has.
    """
    _check_name(model)
    network, origin = _from_weights(model, file)
    return _parts(model, network), origin


def _from_weights(model: str, file: WeightsFile) -> tuple[nn.Module, WeightsOrigin]:
    path = file.path
    preprocessing = read_json(path.with_name("open_clip_config.json")).get("preprocess_cfg")
    network = _untrained(model, force_preprocess_cfg=preprocessing if path.name.startswith("open_clip_") else None)
    uses = activation.of_model(network)
    refusal, note = activation.compare(file.activation, model, uses, str(path))
    if refusal is not None:
        raise WeightsError(refusal)
    _fill(network, file, model)
    if note is not None and file.activation is not None and file.activation.name != uses:
        warnings.warn(note, stacklevel=5)
    tag = file.released_as[1] if file.released_as else None
    return network, _origin(model, str(path), file.form, file.sha256, network, tag, note)


def _fill(network: nn.Module, file: WeightsFile, model: str) -> None:
    """Load a file's tensors; every name and shape must fit.

    Raises:
        WeightsError: the file holds adapters besides CLIP, or other names or shapes than the model.
    """
    if any(".adaptmlp" in name for name in file.state):
        raise WeightsError(
            f"pretrained: {file.path} holds adapters of MoE-Adapters4CL besides CLIP, which a plain {model} would ignore. "
            f"`clk export {file.path} --model {model} --output DIR` makes an adapter file of it"
        )
    wanted, state = network.state_dict(), file.state
    if "positional_embedding" in state and "positional_embedding" not in wanted:
        state = lazy_open_clip.model.convert_to_custom_text_state_dict(dict(state))
    state = {
        name: value.reshape(wanted[name].shape)
        if name in wanted and value.numel() == wanted[name].numel() == 1
        else value
        for name, value in state.items()
    }
    problems = [
        *_listed("it lacks", [name for name in wanted if name not in state]),
        *_listed(f"{model} does not know its", [name for name in state if name not in wanted]),
        *_listed(
            "of another shape are",
            [
                f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
                for name, value in wanted.items()
                if name in state and state[name].shape != value.shape
            ],
        ),
    ]
    if problems:
        raise WeightsError(f"pretrained: {file.path} ({file.form}) does not fit {model}: {'; '.join(problems)}")
    network.load_state_dict(state)


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{what} {', '.join(names[:_LISTED])}{more}"] if names else []


def check_tag(model: str, tag: str) -> None:
    """Hold an open_clip tag against the model that shall load it; nothing is downloaded.

    Raises:
        ValueError: the model's name is unknown.
        WeightsError: it has another activation than the weights were trained with.
        FileNotFoundError: it has no such tag.
    """
    _check_name(model)
    if not lazy_open_clip.pretrained.get_pretrained_cfg(model, tag):
        tags = ", ".join(lazy_open_clip.library.list_pretrained_tags_by_model(model)) or "none"
        raise FileNotFoundError(f"pretrained: {tag!r} is neither a file nor a tag of {model} (tags: {tags})")
    quick = bool((lazy_open_clip.library.get_model_config(model) or {}).get("quick_gelu", False))
    uses = activation.QUICK if quick else activation.EXACT
    refusal, _ = activation.compare(activation.of_tag(model, tag), model, uses, repr(tag))
    if refusal is not None:
        raise WeightsError(refusal)


def _tagged(model: str, tag: str) -> tuple[nn.Module, WeightsOrigin]:
    check_tag(model, tag)
    config = lazy_open_clip.pretrained.get_pretrained_cfg(model, tag)
    try:
        file = Path(lazy_open_clip.pretrained.download_pretrained(config))
        network = lazy_open_clip.library.create_model(model, pretrained=tag)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"pretrained: the weights {tag!r} of {model} are not on disk and could not be downloaded "
            f"({error}). Download them on a machine with a connection and pass the file's path instead."
        ) from error
    return network, _origin(model, tag, "open_clip tag", file_sha256(file), network, tag)


def _from_folder(model: str) -> tuple[nn.Module, WeightsOrigin]:
    folder = Path(model.removeprefix(_LOCAL))
    config = read_json(folder / "open_clip_config.json").get("model_cfg")
    files = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()]
    if not config or not files:
        raise FileNotFoundError(
            f"model: {folder} needs open_clip_config.json and one of {', '.join(_FOLDER_FILES)}, as `clk export` writes them"
        )
    network = lazy_open_clip.library.create_model(model)
    origin = _origin(model, str(files[0]), "folder of open_clip", file_sha256(files[0]), network)
    return network, replace(origin, model_cfg=config)


def _origin(
    model: str,
    source: str,
    form: str,
    sha256: str,
    network: nn.Module,
    tag: str | None = None,
    note: str | None = None,
) -> WeightsOrigin:
    return WeightsOrigin(
        model=model,
        source=source,
        form=form,
        sha256=sha256,
        fingerprint=fingerprint(network.state_dict()),
        activation=activation.of_model(network),
        released_as=tag,
        notes=(note,) if note else (),
        model_cfg=lazy_open_clip.library.get_model_config(model) if not model.startswith(_LOCAL) else None,
    )

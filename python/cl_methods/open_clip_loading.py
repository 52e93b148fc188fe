"""open_clip models with weights on disk, their tokenizers and the image transforms of the published runs."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods.torchvision_compat import prepare_torchvision

prepare_torchvision()

import open_clip  # noqa: E402
from open_clip.transformer import QuickGELU  # noqa: E402

Transform = Callable[[Any], Tensor]


Parts = tuple[nn.Module, Callable[[Sequence[str]], Tensor], Transform, Transform]
"""Network, tokenizer, training transform, evaluation transform."""


def load_open_clip(model: str, pretrained: str | None) -> Parts:
    """(network, tokenizer, training transform, evaluation transform) of an open_clip model.

    Args:
        model: open_clip name, or ``"local-dir:PATH"`` (configuration and weights in one folder).
        pretrained: path of a checkpoint (safetensors, state dict, or OpenAI's TorchScript archive), or an open_clip tag.

    Raises:
        ValueError: the name is unknown, or weights are needed and not named.
        FileNotFoundError: the weights are neither on disk nor can they be downloaded.
    """
    local = model.startswith("local-dir:")
    if not local:
        _check_name(model)
    if not local and pretrained is None:
        raise ValueError(f"pretrained: {model} needs weights; give the path of a checkpoint, or an open_clip tag")
    return _parts(model, _network(model, pretrained))


def untrained_open_clip(model: str) -> Parts:
    """The same with random weights: for counting and timing, which do not need trained ones.

    Raises:
        ValueError: the name is unknown.
    """
    _check_name(model)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # that the weights are random is the point here
    try:
        return _parts(model, open_clip.create_model(model))
    finally:
        logger.setLevel(level)


def _check_name(model: str) -> None:
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"model: expected 'mini' or one of open_clip.list_models(), got {model!r}")


def _parts(model: str, network: nn.Module) -> Parts:
    return network, open_clip.get_tokenizer(model), *image_transforms(open_clip.get_model_preprocess_cfg(network))


def _network(model: str, pretrained: str | None) -> nn.Module:
    path = Path(pretrained) if pretrained is not None else None
    if path is not None and path.is_file():
        archive = _is_torchscript(path)
        if not archive:
            return open_clip.create_model(model, pretrained=str(path))
        network = open_clip.create_model(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's archives exist in this form only
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        sizes = ("input_resolution", "context_length", "vocab_size")
        network.load_state_dict({name: value.float() for name, value in state.items() if name not in sizes})
        _warn_if_gelu_differs(network, model, str(path))
        return network
    known = pretrained is None or open_clip.get_pretrained_cfg(model, pretrained)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise FileNotFoundError(f"pretrained: {pretrained!r} is neither a file nor a tag of {model} (tags: {tags})")
    try:
        network = open_clip.create_model(model, pretrained=pretrained)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"pretrained: the weights {pretrained!r} of {model} are not on disk and could not be downloaded "
            f"({error}). Download them on a machine with a connection and pass the file's path instead."
        ) from error
    if pretrained == "openai":
        _warn_if_gelu_differs(network, model, pretrained)
    return network


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _warn_if_gelu_differs(network: nn.Module, model: str, weights: str) -> None:
    if not any(isinstance(module, QuickGELU) for module in network.modules()):
        warnings.warn(
            f"{weights} holds OpenAI weights, trained with QuickGELU, but {model} uses GELU: features will be off. "
            f"Use the model '{model}-quickgelu'.",
            stacklevel=4,
        )


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

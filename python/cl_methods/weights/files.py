"""Reading files of weights in every form that people have, without ever running what is in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cl_methods.weights import activation, hugging_face
from cl_methods.weights.activation import Activation

_SECTIONS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SIZES = ("input_resolution", "context_length", "vocab_size")


class WeightsError(ValueError):
    """A file of weights cannot be used. The message names it and says what it is and what was expected."""


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of one file.

    Attributes:
        path: the file.
        form: what it was found to be.
        state: tensors by the names of CLIP or of the public code that wrote them; floating point in float32, as every public
            implementation computes.
        sha256: of the file.
        released_as: (model, tag) under which open_clip lists these very bytes, or None.
        activation: with which the weights were trained, or None if nothing tells.
    """

    path: Path
    form: str
    state: dict[str, Tensor]
    sha256: str
    released_as: tuple[str, str] | None
    activation: Activation | None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | Path) -> WeightsFile:
    """Tensors, form and origin of a file: safetensors, TorchScript archive, state dict or training checkpoint.

    Files are read as data: safetensors, ``torch.load(weights_only=True)``, and TorchScript archives, whose code is not called.
    ``module.`` and ``_orig_mod.`` of wrapped models are taken off, names of Hugging Face's transformers become open_clip's.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, would have to run code to be read, or does not hold a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    found: Activation | None
    if path.suffix == ".safetensors":
        state, form, found = _safetensors(path)
    elif is_torchscript(path):
        state, form, found = _archive(path)
    else:
        state, form, found = _pickled(path)
    state = _unwrapped(state)
    if found is None and all(name in state for name in _SIZES):
        found = Activation(activation.QUICK, True, f"{', '.join(_SIZES)} are stored by OpenAI only")
    state = {name: value for name, value in state.items() if name not in _SIZES}
    if hugging_face.recognised(state):
        state, form = hugging_face.converted(state, path), f"{form} of Hugging Face's transformers"
    digest = file_sha256(path)
    released = activation.released_as(digest)
    if released is not None:
        found = activation.of_tag(*released)
    elif any(".adaptmlp_list." in name for name in state):
        found = Activation(activation.QUICK, True, "the public code of MoE-Adapters has no other activation")
    elif found is None or not found.certain:
        found = activation.of_neighbour(path) or found
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return WeightsFile(path, form, state, digest, released, found)


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of ``torch.jit.save``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _safetensors(path: Path) -> tuple[dict[str, Tensor], str, Activation | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
        return load_file(path), "safetensors", activation.of_metadata(metadata)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error}); download or copy it again") from error


def _archive(path: Path) -> tuple[dict[str, Tensor], str, Activation]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's weights exist in this form only
        try:
            module = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise WeightsError(
                f"{path} is a damaged TorchScript archive ({text}); download or copy it again"
            ) from error
        return dict(module.state_dict()), "TorchScript archive", activation.of_archive(module)


def _pickled(path: Path) -> tuple[dict[str, Tensor], str, Activation | None]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise WeightsError(
            f"{path} holds more than tensors and plain values, so reading it would run code that it brings"
            f"{f' ({reason.strip()})' if reason else ''}. "
            "Save the state dict alone where the file comes from: torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} cannot be read as a file of torch.save ({text}); download or copy it again"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a state dict, or a checkpoint with one")
    section = next((name for name in _SECTIONS if isinstance(content.get(name), Mapping)), None)
    if section is None:
        return _tensors(content, path), "state dict", None
    found = activation.of_checkpoint_name(content.get("name"))
    if found is None and list(content) == ["state_dict"]:
        found = Activation(activation.QUICK, False, "only 'state_dict' is in it, as ZSCL's code saves OpenAI's models")
    return _tensors(content[section], path), "training checkpoint", found


def _tensors(state: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        listed = f"{', '.join(other[:6])}{' …' if len(other) > 6 else ''}" if other else "nothing"
        raise WeightsError(
            f"{path}: expected tensors by name, or a checkpoint with one of {', '.join(_SECTIONS)}; "
            f"these are no tensors: {listed}"
        )
    return dict(state)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what data parallelism and torch.compile put before every one of them."""
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state

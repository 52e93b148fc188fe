"""Weights of a trained run as files that others load: a folder of open_clip, or an adapter file with its configuration."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_methods import lazy_open_clip
from cl_methods.backbone import MINI_WEIGHTS, Backbone, load_backbone
from cl_methods.methods.base import Method
from cl_methods.methods.find import named_in_data
from cl_methods.methods.settings import build_settings
from cl_methods.seeding import derive_seed, seed_everything
from cl_methods.training.export.learnt import (
    ADAPTER,
    ADAPTER_CONFIG,
    FORMAT,
    MODEL,
    MODEL_CONFIG,
    Adapter,
    ExportError,
    read_adapter,
)
from cl_methods.weights import activation


def write_model(folder: Path, backbone: Backbone, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Write ``open_clip_model.safetensors`` and ``open_clip_config.json``, which open_clip loads as ``local-dir:FOLDER``.

    The embedded tiny model, which no configuration of open_clip describes, becomes ``mini_model.safetensors``, which
    :func:`~cl_methods.backbone.load_backbone` loads in the same way.

    Args:
        folder: exists.
        backbone: of the same architecture.
        state: the weights, by the model's names.
        source: what they were made from, for the file's header.

    Returns:
        Names of the files written.

    Raises:
        ExportError: the architecture's configuration is not known.
    """
    wanted = backbone.model.state_dict()
    if state.keys() != wanted.keys():
        missing = sorted(wanted.keys() ^ state.keys())[:6]
        raise ExportError(f"{source}: names differ from those of {backbone.name}: {', '.join(missing)}")
    kind = activation.of_model(backbone.model)
    metadata = {"format": "pt", "activation": kind, "source": source}
    origin = backbone.origin
    if _is_mini(backbone):
        save_file(_separate(state), folder / MINI_WEIGHTS, metadata)
        return [MINI_WEIGHTS]
    if origin is None or origin.model_cfg is None:
        raise ExportError(f"{source}: the configuration of the architecture {backbone.name} is not known to open_clip")
    save_file(_separate(state), folder / MODEL, metadata)
    preprocessing = dict(lazy_open_clip.library.get_model_preprocess_cfg(backbone.model))
    config = {"model_cfg": origin.model_cfg, "preprocess_cfg": preprocessing}
    (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    written = [MODEL, MODEL_CONFIG]
    if hasattr(backbone.tokenize, "save_pretrained"):  # a tokenizer that open_clip then looks for in the folder
        before = set(folder.iterdir())
        backbone.tokenize.save_pretrained(str(folder))
        written += sorted(path.name for path in set(folder.iterdir()) - before)
    return written


def _is_mini(backbone: Backbone) -> bool:
    origin = backbone.origin
    return origin is not None and (origin.model == "mini" or origin.source.endswith(MINI_WEIGHTS))


def write_adapter(folder: Path, adapter: Adapter, state: Mapping[str, Tensor]) -> list[str]:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; :func:`load_adapter` reads them.

    Args:
        folder: exists.
        adapter: the configuration.
        state: the method's tensors, by the names of its ``state_dict``.

    Returns:
        Names of the files written.
    """
    save_file(_separate(state), folder / ADAPTER, {"format": "pt", "method": adapter.method, "source": adapter.source})
    content = {"format": FORMAT, "version": 1, **asdict(adapter)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [ADAPTER, ADAPTER_CONFIG]


def load_adapter(
    folder: str | Path,
    *,
    backbone: Backbone | None = None,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> Method:
    """A method as it was after its last task, on a fresh backbone: ready for ``before_evaluation`` and ``logits``.

    Args:
        folder: holds ``adapter_model.safetensors`` and ``adapter_config.json``.
        backbone: with the weights that the adapters were trained on, nothing mounted; None loads the model that the
            configuration names, from the folder itself where it brings one.
        pretrained: file or tag of these weights, if they lie elsewhere than where the run had them.
        device: where to put a backbone that is loaded here.
        settings: of the method, where they have to differ, such as paths.

    Raises:
        ExportError: the folder holds no adapter file, or the backbone has other weights than the adapters were trained on.
        ValueError: the backbone cannot be loaded, or a setting is wrong.
        RuntimeError: the tensors do not fit the method.
    """
    folder = Path(folder)
    adapter, state = read_adapter(folder)
    method_type = named_in_data(adapter.method, folder)
    config = build_settings(method_type.Config, _merged(adapter.settings, settings or {}))
    seed_everything(derive_seed(adapter.seed, "build"))
    if backbone is None and pretrained is None and any((folder / name).is_file() for name in (MODEL, MINI_WEIGHTS)):
        backbone = load_backbone(f"local-dir:{folder}", device=device)
    elif backbone is None:
        backbone = load_backbone(adapter.model, pretrained or adapter.pretrained, device=device)
    found = backbone.origin.fingerprint if backbone.origin is not None else None
    if found is not None and adapter.base_fingerprint not in (None, found):
        raise ExportError(
            f"backbone: these adapters were trained on weights with fingerprint {str(adapter.base_fingerprint)[:12]} "
            f"({adapter.model}, {adapter.pretrained or 'its own'}), these have {found[:12]}"
        )
    method = method_type(backbone, config, None)
    method.load_state_dict({name: value.to(backbone.device) for name, value in state.items()})
    return method


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` overridden by ``changes``, sections key by key."""
    return {**values} | {
        name: _merged(values[name], value)
        if isinstance(value, Mapping) and isinstance(values.get(name), Mapping)
        else value
        for name, value in changes.items()
    }


class NewFolder:
    """A folder that appears whole under its name when the block ends without an error, and not at all otherwise.

    Attributes:
        path: where to write, inside the block.

    Args:
        output: its final name.

    Raises:
        ExportError: ``output`` exists and is not an empty folder.
    """

    def __init__(self, output: Path) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ExportError(f"output: {output} already exists and is not empty; choose another name")
        self.output = output

    def __enter__(self) -> Path:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=self.output.parent))
        self.path.chmod(0o755)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.path.replace(self.output)  # over an empty folder too
        else:
            shutil.rmtree(self.path)


def clip_part(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """What of a method's tensors are the model's own, under the model's names; empty for methods that never change it."""
    names = backbone.model.state_dict().keys()
    return {name: value for name, value in state.items() if name in names}


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}

"""Reading reference values: cases by pattern, metadata as Python values, the tiny CLIP of the zscl_* and moe_* files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task

import open_clip  # isort: skip  # after cl_methods.backbone.model, which prepares torchvision

FOLDER = Path(os.environ.get("CL_GOLDEN_DIR", Path(__file__).parent / "data"))


def names(pattern: str) -> list[str]:
    """Stems of the files that match ``pattern``; at least one must exist."""
    found = sorted(path.stem for path in FOLDER.glob(pattern + ".safetensors"))
    if not found:
        raise FileNotFoundError(f"no reference values {pattern}.safetensors in {FOLDER}")
    return found


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of one file; metadata values are decoded where they are JSON."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = {key: _decode(value) for key, value in (file.metadata() or {}).items()}
    return tensors, metadata


def _decode(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


class TokenTable:
    """A tokenizer for texts that exist as token ids only: text ``"NAME i"`` is row i of the ids called NAME."""

    def __init__(self, **tokens: Tensor) -> None:
        self.tokens = tokens

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name} {row}" for row in range(len(self.tokens[name])))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [text.rsplit(" ", 1) for text in texts]
        return torch.stack([self.tokens[name][int(row)] for name, row in rows])


def clip_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A full state dict from one whose token embedding holds only the used rows; the other rows are zero."""
    state = dict(tensors)
    ids, rows = state.pop("token_embedding.ids"), state.pop("token_embedding.rows")
    state["token_embedding.weight"] = torch.zeros(int(ids.max()) + 1, rows.shape[1]).index_copy(0, ids, rows)
    return state


def tiny_clip(tokenize: TokenTable) -> Backbone:
    """The tiny CLIP of zscl_start with its zero-shot weights."""
    tensors, meta = load("zscl_start")
    state = clip_state(tensors)
    model = open_clip.CLIP(
        embed_dim=meta["embed_dim"],
        vision_cfg={
            "image_size": meta["image_resolution"],
            "layers": meta["vision_layers"],
            "width": meta["vision_width"],
            "head_width": meta["vision_width"] // meta["heads"],
            "patch_size": meta["patch_size"],
        },
        text_cfg={
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": meta["text_width"],
            "heads": meta["heads"],
            "layers": meta["text_layers"],
        },
        quick_gelu=True,
    )
    model.load_state_dict(state)
    return Backbone(model, tokenize, _no_transform, _no_transform, name="golden")


def _no_transform(image: Any) -> Tensor:
    raise AssertionError("the reference values hold transformed images")


def task(name: str, table: TokenTable) -> Task:
    """A task that has class texts but no images of its own (batches come from the file)."""
    nothing = TensorImages(torch.zeros(0, 3, 1, 1, dtype=torch.uint8))
    return Task(name, table.texts(name), ("{}",), nothing, nothing, nothing)


def reference(name: str, table: TokenTable) -> Reference:
    """Reference captions from the table, without images."""
    return Reference(TensorImages(torch.zeros(0, 3, 1, 1, dtype=torch.uint8)), table.texts(name))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected (absolute where the latter is zero)."""
    norm = expected.double().norm()
    error = (value.detach().double() - expected.double()).norm()
    return float(error / norm if norm > 0 else error)


def max_error(value: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    largest = expected.double().abs().max()
    error = (value.detach().double() - expected.double()).abs().max()
    return float(error / largest if largest > 0 else error)


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """``in_proj_bias`` without its key third, whose gradient is zero but for rounding; other parameters as they are."""
    if not name.endswith("attn.in_proj_bias"):
        return value
    third = len(value) // 3
    return torch.cat([value[:third], value[2 * third :]])

"""With which activation weights were trained: QuickGELU weights run in a GELU model without any error, and lose points silently."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from cl_methods import lazy_open_clip

QUICK, EXACT = "QuickGELU", "GELU"
_RUN_NAME = re.compile(r"model_(?P<model>.+?)-lr_")


@dataclass(frozen=True)
class Activation:
    """What is known of the activation that weights were trained with.

    Attributes:
        name: ``QuickGELU`` or ``GELU``.
        certain: the file says so itself; otherwise it is what such files usually are.
        why: the evidence, as the end of a sentence.
    """

    name: str
    certain: bool
    why: str


def _named(quick: bool) -> str:
    return QUICK if quick else EXACT


def of_model(network: nn.Module) -> str:
    """``QuickGELU`` if any module of the network is one, else ``GELU``."""
    return _named(any(isinstance(module, lazy_open_clip.transformer.QuickGELU) for module in network.modules()))


@cache
def _released() -> dict[str, tuple[str, str]]:
    """sha256 (or its first eight digits) of the files that open_clip's list names by address -> (model, tag)."""
    found: dict[str, tuple[str, str]] = {}
    for model, tag in lazy_open_clip.library.list_pretrained():
        url = lazy_open_clip.pretrained.get_pretrained_cfg(model, tag).get("url") or ""
        if "openaipublic" in url:
            found.setdefault(url.split("/")[-2], (model, tag))
        elif "mlfoundations" in url:
            digits = Path(url).stem.rpartition("-")[2]
            if re.fullmatch(r"[0-9a-f]{8}", digits):
                found.setdefault(digits, (model, tag))
    return found


def released_as(sha256: str) -> tuple[str, str] | None:
    """(model, tag) under which open_clip lists a file with this sha256, or None."""
    table = _released()
    return table.get(sha256) or table.get(sha256[:8])


def of_tag(model: str, tag: str) -> Activation:
    """What open_clip's list says of a tag."""
    quick = bool(lazy_open_clip.pretrained.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    return Activation(_named(quick), True, f"open_clip's list says so of {tag!r}")


def of_checkpoint_name(name: Any) -> Activation | None:
    """From the name that open_clip's training gives its runs and stores in its checkpoints; None if it names no known model."""
    match = _RUN_NAME.search(name) if isinstance(name, str) else None
    config = lazy_open_clip.library.get_model_config(match["model"]) if match else None
    if match is None or config is None:
        return None
    return Activation(_named(config.get("quick_gelu", False)), True, f"its training run was {match['model']}")


def of_metadata(metadata: Mapping[str, str]) -> Activation | None:
    """From the header of a safetensors file that we wrote."""
    name = metadata.get("activation")
    return Activation(name, True, "its header says so") if name in (QUICK, EXACT) else None


def of_neighbour(path: Path) -> Activation | None:
    """From the configuration beside a file: ``open_clip_config.json``, or ``config.json`` of Hugging Face's transformers."""
    config = read_json(path.with_name("open_clip_config.json")).get("model_cfg")
    if isinstance(config, dict) and path.name.startswith("open_clip_"):
        return Activation(
            _named(bool(config.get("quick_gelu", False))), True, "open_clip_config.json beside it says so"
        )
    config = read_json(path.with_name("config.json")).get("vision_config")
    if isinstance(config, dict) and path.name.startswith(("model", "pytorch_model")):
        quick = config.get("hidden_act", "quick_gelu") == "quick_gelu"
        return Activation(_named(quick), True, "config.json beside it says so")
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no such file.

    Raises:
        ValueError: the file is not JSON, or no mapping.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def of_archive(module: Any) -> Activation:
    """From the code of a TorchScript archive: the class names of its modules, else the arithmetic in their graphs.

    An archive without code has nothing to go by; OpenAI's are the only weights of CLIP that come in this form.
    """
    for name, inner in module.named_modules():
        kind = getattr(inner, "original_name", "")
        if kind in ("QuickGELU", "GELU"):
            return Activation(kind, True, f"module {name!r} of the archive is a {kind}")
    for inner in (module, *module.modules()):
        text = str(inner.inlined_graph) if hasattr(inner, "inlined_graph") else ""
        if "1.702" in text:
            return Activation(QUICK, True, "the archive's code computes x * sigmoid(1.702 x)")
        if "aten::gelu" in text:
            return Activation(EXACT, True, "the archive's code calls gelu")
    return Activation(QUICK, False, "CLIP comes as a TorchScript archive from OpenAI only")


def compare(found: Activation | None, model: str, uses: str, source: str) -> tuple[str | None, str | None]:
    """(refusal, note): what to say of a model that uses one activation and weights that were trained with another, or unknown.

    Args:
        found: what is known of the weights.
        model: the architecture's name.
        uses: its activation.
        source: what the weights are called.
    """
    other = model.removesuffix("-quickgelu") if uses == QUICK else f"{model}-quickgelu"
    if found is None:
        return None, (
            f"nothing in the file says with which activation it was trained; {uses} is assumed, as in {model} "
            "(OpenAI's weights, and what was fine-tuned from them, need QuickGELU)"
        )
    if found.name == uses:
        return None, None if found.certain else f"{uses} is assumed: {found.why}"
    if found.certain:
        return (
            f"pretrained: {source} was trained with {found.name} ({found.why}), but {model} uses {uses}: every feature would "
            f"be off, without any error. Use the model '{other}'"
        ), None
    return None, (
        f"{source} is probably trained with {found.name} ({found.why}), but {model} uses {uses}: if so, features are "
        f"off. Use the model '{other}'"
    )

"""Names of Hugging Face's ``CLIPModel`` as those of OpenAI and open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_SINGLE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_TOWERS = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}


def recognised(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of Hugging Face's ``CLIPModel``."""
    return "vision_model.embeddings.class_embedding" in state


def converted(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors under open_clip's names: q, k and v stacked, the projections transposed, positions dropped.

    Args:
        state: by the names of ``CLIPModel``.
        path: the file, for messages.

    Raises:
        ValueError: a name is not known, or one of q, k and v is missing.
    """
    found: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in state.items():
        block = _BLOCK.fullmatch(name)
        if name.endswith("embeddings.position_ids"):
            continue
        if name in _SINGLE:
            found[_SINGLE[name]] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T.contiguous()
        elif block is not None:
            place, (part, _, kind) = f"{_TOWERS[block[1]]}.{block[2]}", block[3].rpartition(".")
            if part in _PARTS:
                found[f"{place}.{_PARTS[part]}.{kind}"] = value
            elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                attention.setdefault(f"{place}.attn.in_proj_{kind}", {})[part[-6]] = value
            else:
                unknown.append(name)
        else:
            unknown.append(name)
    incomplete = [name for name, parts in attention.items() if parts.keys() != {"q", "k", "v"}]
    if unknown or incomplete:
        listed = ", ".join((unknown + incomplete)[:6])
        raise ValueError(f"{path}: expected the names of Hugging Face's CLIPModel, unknown or incomplete are {listed}")
    found |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in attention.items()}
    return found

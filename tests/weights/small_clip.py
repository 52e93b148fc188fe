"""A small CLIP in OpenAI's real layout (heads 64 wide, two widths, their vocabulary) and its weights in every form of file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cl_methods import backbone as _prepares_torchvision  # noqa: F401

import open_clip  # isort: skip

GELU, QUICK, CUSTOM = "small-test", "small-test-quickgelu", "small-test-custom-text"
VISION, TEXT, EMBEDDING, LAYERS = 128, 64, 32, 2


def register(folder: Path) -> None:
    config = {
        "embed_dim": EMBEDDING,
        "vision_cfg": {"image_size": 16, "layers": LAYERS, "width": VISION, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT, "heads": TEXT // 64, "layers": LAYERS},
    }
    for name, extra in ((GELU, {}), (QUICK, {"quick_gelu": True}), (CUSTOM, {"quick_gelu": True, "custom_text": True})):
        (folder / f"{name}.json").write_text(json.dumps(config | extra))
        open_clip.add_model_config(folder / f"{name}.json")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        for value in model.parameters():  # so that no two tensors are equal by construction
            value.add_(0.01 * torch.randn_like(value))
        model.logit_scale.fill_(4.6052)
    return model


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in float16, as in OpenAI's files."""
    return {name: value.half() if value.ndim > 1 else value for name, value in state.items()}


SIZES = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


class Images(nn.Module):
    """The image tower alone, whose code an archive then holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, value in model.named_parameters(recurse=False):
            self.register_parameter(name, value)

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


def archive(model: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Images(model), torch.zeros(1, 3, 16, 16), check_trace=False)
        traced.save(str(path))


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of ``CLIPModel``, written down a second time, from the other side."""
    found: dict[str, Tensor] = {"logit_scale": state["logit_scale"]}
    for tower, prefix in (("vision", "visual."), ("text", "")):
        base = f"{tower}_model."
        for index in range(LAYERS):
            here, there = f"{prefix}transformer.resblocks.{index}.", f"{base}encoder.layers.{index}."
            for kind in ("weight", "bias"):
                for part, rows in zip("qkv", state[f"{here}attn.in_proj_{kind}"].chunk(3), strict=True):
                    found[f"{there}self_attn.{part}_proj.{kind}"] = rows.clone()
                found[f"{there}self_attn.out_proj.{kind}"] = state[f"{here}attn.out_proj.{kind}"]
                for number in (1, 2):
                    found[f"{there}layer_norm{number}.{kind}"] = state[f"{here}ln_{number}.{kind}"]
                found[f"{there}mlp.fc1.{kind}"] = state[f"{here}mlp.c_fc.{kind}"]
                found[f"{there}mlp.fc2.{kind}"] = state[f"{here}mlp.c_proj.{kind}"]
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        found[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    found["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    found["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    found["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    found["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    found["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    found["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    found["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    found["text_projection.weight"] = state["text_projection"].T.contiguous()
    return found


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


Change = Callable[[dict[str, Tensor]], None]

"""Residual blocks through ``torch.compile``: one block of each tower is compiled, and all others run the same code."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.backbone.text_trees import open_clip_blocks, reads_trees
from cl_methods.components.adapters import block_parts, carries_adapters

Compile = Literal["none", "blocks", "cuda_graphs"]


def check_compile(compile: Compile, device: torch.device) -> None:
    """Refuse what cannot work here, before anything is loaded.

    Raises:
        ValueError: CUDA graphs without CUDA; no compiler that torch.compile could use.
    """
    if compile == "none":
        return
    if compile == "cuda_graphs" and device.type != "cuda":
        raise ValueError(
            f"compile: CUDA graphs need a CUDA device, got {device}; expected 'blocks', which compiles here, or 'none'"
        )
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise ValueError(
                f"compile: torch.compile needs Triton on a GPU and it is not installed, got {compile!r}; expected 'none'"
            )
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler on a CPU and there is no {compiler} on PATH (CXX names another), "
            f"got {compile!r}; expected 'none'"
        )


def compile_blocks(backbones: Iterable[Backbone], compile: Compile = "blocks", **options: Any) -> None:
    """Let the residual blocks of both towers run compiled wherever gradients are recorded; elsewhere they run their own code.

    Plain blocks are compiled whole; of blocks that carry adapters what is frozen, beside the kernels of the adapters. Sizes of
    batches and lengths of texts are symbols, so other ones compile nothing anew. Parameters and names stay, and copies of the
    models made afterwards are compiled like them. Losses and gradients are those of the plain blocks up to rounding.

    Args:
        backbones: models whose blocks are compiled.
        compile: ``blocks``, or ``cuda_graphs`` to replay them as CUDA graphs besides: one for each shape that is met, so for
            shapes that repeat.
        options: further ones of ``torch.compile``.

    Raises:
        ValueError: a block runs a ``forward`` that is neither open_clip's own nor that of the adapters.
    """
    if compile == "none":
        return
    if compile == "cuda_graphs":
        options = {"mode": "reduce-overhead", **options}
    whole = torch.compile(_own_forward, dynamic=True, **options)
    parts = torch.compile(block_parts, dynamic=True, **options)
    chosen: list[tuple[Any, bool]] = []
    for backbone in backbones:
        chosen += _chosen(backbone, compile)
    for block, adapted in chosen:
        if adapted:
            block.compiled_parts = parts
        else:
            block.forward = partial(_compiled_forward, whole, block)


def _chosen(backbone: Backbone, compile: Compile) -> list[tuple[Any, bool]]:
    """Blocks of both towers, each with whether it carries adapters."""
    found = []
    for tower, model in (("visual", backbone.model.visual), ("text", backbone.text_tower)):
        blocks = getattr(getattr(model, "transformer", None), "resblocks", None)
        if blocks is None or any(type(block) not in open_clip_blocks() for block in blocks):
            raise ValueError(
                f"compile: got {compile!r}, but the {tower} tower of {backbone.name} is not made of open_clip's residual blocks; "
                "expected 'none'"
            )
        for index, block in enumerate(blocks):
            adapted = carries_adapters(block)
            if "forward" in vars(block) and not adapted:
                raise ValueError(
                    f"compile: got {compile!r}, but block {index} of the {tower} tower runs a forward of this method's own, which "
                    "is not compiled; expected 'none'"
                )
            found.append((block, adapted))
    return found


def _own_forward(block: Any, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    return type(block).forward(block, x, attn_mask=attn_mask)


@reads_trees
def _compiled_forward(
    compiled: Callable[..., Tensor],
    block: Any,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The forward of an open_clip block, compiled where it is part of a training step."""
    if torch.is_grad_enabled() and k_x is None and v_x is None:
        return compiled(block, x, attn_mask)
    others = {} if k_x is None and v_x is None else {"k_x": k_x, "v_x": v_x}
    return type(block).forward(block, x, attn_mask=attn_mask, **others)

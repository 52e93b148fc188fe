"""CLIP text towers (OpenAI's, open_clip's, and forks of them): positions that nobody reads are not computed."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.drop_in.hugging_face import patch_text_model
from cl_kernels.drop_in.patch import Patch, Patched
from cl_kernels.drop_in.probe import relative_difference, undisturbed
from cl_kernels.drop_in.trimming import read_length

_length: ContextVar[int | None] = ContextVar("length of the texts that are being encoded", default=None)


def patch_clip(model: nn.Module) -> Patch:
    """Cut texts after the last end-of-text of the batch before they go through the text tower.

    The tower is causal and reads one position of each text, so what comes later cannot change the result: features and gradients
    are the same up to the rounding of smaller matrix products. The code of the model runs as it is, on shorter texts. Towers that
    read other positions, or attend to later ones, are left.

    Texts on the CPU are looked at every time; of texts on a GPU each tensor once, which waits for the device.

    Args:
        model: a CLIP of OpenAI's form (``encode_text``; ZSCL's, MoE-Adapters4CL's and mammoth's too), of open_clip (``CLIP`` and
            ``CustomTextCLIP``) or of Hugging Face (``CLIPModel``), or any module that holds some.

    Returns:
        The patch: ``replaced`` names text towers, and ``text_model`` of Hugging Face models.

    Raises:
        ValueError: there is no text tower that can be cut.
        TypeError: ``model`` is not a module.

    Source: CLIP (Radford et al., 2021), section 2.4: a causal text encoder, read at the end-of-text token.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module that holds a CLIP")
    patch = Patch("patch_clip")
    for name, module in list(model.named_modules()):
        if all(
            hasattr(module, part) for part in ("token_embedding", "positional_embedding", "transformer", "ln_final")
        ):
            _patch_tower(patch, name or "text tower", module)
        elif all(hasattr(module, part) for part in ("text_model", "vision_model", "text_projection", "logit_scale")):
            patch_text_model(patch, f"{name}.text_model".lstrip("."), module.text_model)
    return patch.require("a causal text tower with token_embedding, positional_embedding, transformer and ln_final")


class _Tower(Patched):
    """While a text is encoded, the tower's embedding of positions and its mask are as long as the text."""

    _eos: int | None
    _context: int

    @property
    def positional_embedding(self: Any) -> Tensor:
        """(length, D)."""
        return self._parameters["positional_embedding"][: _length.get()]

    @property
    def attn_mask(self: Any) -> Tensor:
        """(length, length), of towers that keep one."""
        if "attn_mask" not in self._buffers:
            raise AttributeError("attn_mask")
        length = _length.get()
        return self._buffers["attn_mask"][:length, :length]

    def _cut(self, encode: Callable, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        length = None if text.dim() != 2 or text.shape[1] != self._context else read_length(text, self._eos)
        if length is None or length == self._context:
            return encode(self, text, *args, **kwargs)
        token = _length.set(length)
        try:
            return encode(self, text[:, :length], *args, **kwargs)
        finally:
            _length.reset(token)


class _EncodeText(_Tower):
    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model's own method gives for ``text`` (B, L)."""
        return self._cut(self._cl_kernels_original.encode_text, text, *args, **kwargs)


class _Forward(_Tower):
    def forward(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the tower's own method gives for ``text`` (B, L)."""
        return self._cut(self._cl_kernels_original.forward, text, *args, **kwargs)


class _Attention(Patched):
    """Masks that are longer than the texts are cut to them; blocks of OpenAI's form keep one for the whole context."""

    _context: int

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention with an ``attn_mask`` that may be (context, context)."""
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.shape == (self._context, self._context):
            dim = 1 if self.batch_first else 0
            kwargs["attn_mask"] = mask[: query.shape[dim], : key.shape[dim]]
        return self._cl_kernels_original.forward(self, query, key, value, *args, **kwargs)


def _patch_tower(patch: Patch, name: str, tower: Any) -> None:
    reason = _why_not(tower)
    if reason is not None:
        patch.left[name] = reason
        return
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)) if _pool(tower) == "eos" else None
    expected = _probe(tower, eos)
    inner = Patch("")
    context = tower.positional_embedding.shape[0]
    for key, module in tower.transformer.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, Patched):
            inner.change_class(key, module, _Attention, _context=context)
    behaviour = _EncodeText if hasattr(tower, "encode_text") else _Forward
    inner.change_class(name, tower, behaviour, _context=context, _eos=eos)
    difference = relative_difference(expected, _probe(tower, eos))
    if difference < 1e-2:
        patch.adopt(name, inner)
    else:
        inner.undo()
        patch.left[name] = f"it is not read at the end of the text: features differ by {difference:.1e} of the largest"


def _pool(tower: Any) -> str | None:
    return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)


def _why_not(tower: Any) -> str | None:
    if isinstance(tower, Patched):
        return "already patched"
    if not isinstance(tower._parameters.get("positional_embedding"), nn.Parameter):
        return "its positional_embedding is not a parameter"
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False):
        return "it appends a class token or returns every token"
    if _pool(tower) not in (None, "argmax", "eos"):
        return f"it is read at another position than the end of the text: pooling is {_pool(tower)!r}"
    own = getattr(tower, "attn_mask", None)
    blocks = [module for module in tower.transformer.modules() if hasattr(module, "attn") and hasattr(module, "ln_1")]
    masks = [getattr(block, "attn_mask", None) for block in blocks] if own is None else [own]
    if not masks or not all(_is_causal(mask) for mask in masks):
        return "its attention is not causal: later positions count"
    return None


def _is_causal(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    later = mask[torch.ones_like(mask, dtype=torch.bool).triu(1)]
    return bool(later.all() if mask.dtype == torch.bool else (later == -torch.inf).all())


def _probe(tower: Any, eos: int | None) -> Tensor:
    """Features (2, d) of two texts that end early."""
    like = tower.token_embedding.weight
    end = len(like) - 1 if eos is None else eos
    context = tower._parameters["positional_embedding"].shape[0]
    tokens = torch.zeros(2, context, dtype=torch.int64)
    for row, length in enumerate((context // 3, context // 2)):
        tokens[row, :length] = torch.arange(length) % max(end, 1)
        tokens[row, length] = end
    with undisturbed(tower, like):
        features = (tower.encode_text if hasattr(tower, "encode_text") else tower)(tokens.to(like.device))
    return features.float()

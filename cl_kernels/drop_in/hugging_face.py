"""Hugging Face's ``CLIPModel``: texts padded to the full context are cut before its text tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_kernels.drop_in.patch import Patch, Patched
from cl_kernels.drop_in.trimming import read_length


class _TextModel(Patched):
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the tower's own method gives for ``input_ids`` (B, L), with hidden states up to the last end of a text."""
        asks = [
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        ]
        plain = attention_mask is None or attention_mask.dim() == 2
        if input_ids is not None and input_ids.dim() == 2 and plain and not any(asks) and not args:
            # Configurations older than transformers 4.31 name id 2, and are read at the largest id.
            length = read_length(input_ids, None if self.eos_token_id == 2 else self.eos_token_id)
            input_ids = input_ids[:, :length]
            attention_mask = None if attention_mask is None else attention_mask[:, :length]
            position_ids = None if position_ids is None else position_ids[:, :length]
        return self._cl_kernels_original.forward(self, input_ids, attention_mask, position_ids, *args, **kwargs)


def patch_text_model(patch: Patch, name: str, text_model: Any) -> None:
    """Patch the tower of a ``CLIPModel`` if it is read at the end of the text."""
    parts = ("embeddings", "encoder", "final_layer_norm", "eos_token_id")
    if isinstance(text_model, Patched):
        patch.left[name] = "already patched"
    elif not all(hasattr(text_model, part) for part in parts):
        patch.left[name] = f"it has not all of {', '.join(parts)}"
    else:
        patch.change_class(name, text_model, _TextModel)

"""The text tower of an open_clip model: where texts are read, and their features from no more positions than that takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods import lazy_open_clip
from cl_methods.backbone.read_out import ReadOut, reading
from cl_methods.backbone.text_trees import TextTrees, plant, takes_trees


class TextTower:
    """What a model's text tower can be asked for; holds nothing but the model.

    Args:
        model: of open_clip.

    Attributes:
        module: holds ``token_embedding``, ``transformer`` and ``ln_final``: the model itself, or its ``text``.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.module = model, getattr(model, "text", model)

    @property
    def context_length(self) -> int:
        """The most tokens of a text."""
        return self.module.context_length

    @property
    def trimmable(self) -> bool:
        """Whether later positions cannot matter: a causal mask, and one read-out position found from the token ids."""
        tower = self.module
        own_layout = all(hasattr(tower, part) for part in ("token_embedding", "positional_embedding", "ln_final"))
        causal = getattr(tower, "attn_mask", None) is not None and not getattr(tower, "use_pad_mask", False)
        plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "output_tokens", False)
        return own_layout and causal and plain and self._pool_type in ("argmax", "eos")

    @property
    def takes_trees(self) -> bool:
        """Whether :meth:`tree_features` computes what :meth:`features` does."""
        return self.trimmable and takes_trees(self.module.transformer)

    def readout(self, tokens: Tensor) -> Tensor:
        """(N,) position at which each text of ``tokens`` (N, L) is read."""
        if self._pool_type == "eos":
            return (tokens == torch.tensor(self._end_id)).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)

    def features(self, tokens: Tensor, *, trims_last_block: bool) -> Tensor:
        """Features (N, d) before normalisation.

        Args:
            tokens: (N, L) int64 on the model's device; L may be less than the context where the tower is :attr:`trimmable`.
            trims_last_block: see :class:`~cl_methods.backbone.Backbone`.
        """
        if not self.trimmable:
            return self.model.encode_text(tokens)
        tower, length = self.module, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        with reading(ReadOut(partial(self.readout, tokens)) if trims_last_block else None):
            x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        if x.shape[1] < length:  # the last block computed nothing but the position that is read
            return self._projected(tower.ln_final(x)[:, 0])
        pool = lazy_open_clip.transformer.text_global_pool
        return self._projected(pool(tower.ln_final(x), tokens, self._pool_type, eos_token_id=self._end_id))

    def tree_features(self, tokens: Tensor, device: torch.device) -> Tensor:
        """:meth:`features` (N, d) of texts that begin alike: what several share is computed once.

        Args:
            tokens: (N, L) int64 on the CPU, N at least 1.
            device: of the model.
        """
        trees = plant(tokens, self.readout(tokens) + 1)
        computed = [(self._features_of(part.to(device)), texts) for part, texts in trees.parts()]
        order = torch.cat([texts for _, texts in computed]).argsort()
        return torch.cat([features for features, _ in computed])[order.to(device)]

    def _features_of(self, trees: TextTrees) -> Tensor:
        tower = self.module
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(trees.tokens).to(dtype) + tower.positional_embedding[trees.depths].to(dtype)
        block = tower.transformer.resblocks[0]
        x = tower.transformer(x, attn_mask=trees.mask(block.attn.num_heads, dtype))
        return self._projected(tower.ln_final(x[trees.rows, trees.places]))

    def _projected(self, x: Tensor) -> Tensor:
        projection = self.module.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    @property
    def _pool_type(self) -> str | None:
        return getattr(self.module, "text_pool_type", None) or getattr(self.module, "pool_type", None)

    @property
    def _end_id(self) -> int | None:
        return getattr(self.module, "text_eos_id", getattr(self.module, "eos_id", None))

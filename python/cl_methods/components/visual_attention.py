"""Visual-guided attention: class texts look at each other and at image features, through one layer of a transformer decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisualGuidedAttention(nn.TransformerDecoderLayer):
    """``v = LN(x + FFN(x))``, ``x = LN(y + A(y, memory))``, ``y = LN(t + A(t, t))``: one head, GELU, normalised after each part.

    Parameters, their names and their initialisation are those of ``nn.TransformerDecoderLayer``; the forward pass is written out
    for one sequence of texts without padding: 26 dispatched operations with dropout.

    Args:
        width: d of the features.
        hidden: width of the feed-forward part.
        dropout: of attention weights and after each part, in training mode.

    Source: CLAP4CLIP (Jha et al., NeurIPS 2024), equation 5.
    """

    def __init__(self, width: int, hidden: int = 2048, dropout: float = 0.1) -> None:
        super().__init__(width, 1, hidden, dropout, F.gelu, batch_first=True)
        self.rate, self.scale = dropout, width**-0.5

    def forward(self, texts: Tensor, memory: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """What the texts see in ``memory``.

        Args:
            texts: (C, d).
            memory: (B, d) image features, all of which every text looks at.
            mask: (C, C), 0 where a text may look at another and −inf elsewhere.

        Returns:
            (C, d).
        """
        x, (cross, width) = self.attend_to_texts(texts, mask), (self.multihead_attn, texts.shape[1])
        query = F.linear(x, cross.in_proj_weight[:width], cross.in_proj_bias[:width])
        key, value = F.linear(memory, cross.in_proj_weight[width:], cross.in_proj_bias[width:]).chunk(2, dim=1)
        weights = self._drop((query * self.scale @ key.T).softmax(dim=1))
        return self._finish(x, cross.out_proj(weights @ value))

    def alone(self, texts: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """What the texts see in each image on its own: (B, C, d), row b being ``forward(texts, memory[b : b + 1], mask)``.

        All attention goes to the one image, so it adds the same to every text and nothing has to be compared.

        Args:
            texts: (C, d).
            memory: (B, d).
            mask: (C, C).
        """
        cross, width = self.multihead_attn, texts.shape[1]
        value = F.linear(memory, cross.in_proj_weight[2 * width :], cross.in_proj_bias[2 * width :])
        return self._finish(self.attend_to_texts(texts, mask), cross.out_proj(value)[:, None])

    def attend_to_texts(self, texts: Tensor, mask: Tensor) -> Tensor:
        """The first of the three parts, which no image enters: (C, d) from ``texts`` (C, d) and ``mask`` (C, C)."""
        own = self.self_attn
        query, key, value = F.linear(texts, own.in_proj_weight, own.in_proj_bias).chunk(3, dim=1)
        weights = self._drop(torch.addmm(mask, query, key.T, alpha=self.scale).softmax(dim=1))
        return self.norm1(texts + self._drop(own.out_proj(weights @ value)))

    def _finish(self, x: Tensor, seen: Tensor) -> Tensor:
        """The rest of the layer once the texts have ``seen`` the images; both broadcast to (…, C, d)."""
        x = self.norm2(x + self._drop(seen))
        return self.norm3(x + self._drop(self.linear2(self._drop(F.gelu(self.linear1(x))))))

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout as one operation on every device."""
        return torch.native_dropout(x, self.rate, True)[0] if self.training and self.rate else x

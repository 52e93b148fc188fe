"""Text towers with the names and the behaviour of OpenAI's CLIP and Hugging Face's CLIPModel, written from their descriptions."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

CONTEXT, WORDS, WIDTH = 24, 50, 16


class Block(nn.Module):
    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2)
        self.mlp, self.attn_mask = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), mask

    def attention(self, x: Tensor) -> Tensor:
        self.attn_mask = self.attn_mask.to(x) if self.attn_mask is not None else None
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenAIStyle(nn.Module):
    """Masks live in the blocks; ``encode_text`` adds all positions and reads the largest token id."""

    def __init__(self, causal: bool = True, read: str = "end") -> None:
        super().__init__()
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1) if causal else None
        self.read = read
        self.transformer = nn.Sequential(Block(mask), Block(mask))
        self.token_embedding, self.ln_final = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 8))

    def encode_text(self, text: Tensor, scale: float = 1.0) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        x = x[torch.arange(len(x)), text.argmax(dim=-1)] if self.read == "end" else x.mean(dim=1)
        return scale * x @ self.text_projection

    def forward(self, text: Tensor) -> Tensor:
        return self.encode_text(text)


class TextModel(nn.Module):
    """Hugging Face's: the mask is made for the length at hand; padding may be masked too."""

    def __init__(self, eos_token_id: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(output_hidden_states=False, output_attentions=False)
        self.eos_token_id = eos_token_id
        self.embeddings = nn.ModuleDict({"token": nn.Embedding(WORDS, WIDTH), "position": nn.Embedding(CONTEXT, WIDTH)})
        self.encoder, self.final_layer_norm = Block(None), nn.LayerNorm(WIDTH)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_hidden_states=False,
    ):
        n, length = input_ids.shape
        position_ids = torch.arange(length)[None] if position_ids is None else position_ids
        x = self.embeddings["token"](input_ids) + self.embeddings["position"](position_ids)
        mask = torch.full((length, length), float("-inf")).triu(1).expand(n, 2, -1, -1)
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, float("-inf"))
        self.encoder.attn_mask = mask.reshape(2 * n, length, length)
        hidden = self.final_layer_norm(self.encoder(x.permute(1, 0, 2)).permute(1, 0, 2))
        ids = input_ids.int()
        end = (ids if self.eos_token_id == 2 else (ids == self.eos_token_id).int()).argmax(dim=-1)
        return SimpleNamespace(last_hidden_state=hidden, pooler_output=hidden[torch.arange(n), end])


class HuggingFaceStyle(nn.Module):
    def __init__(self, eos_token_id: int) -> None:
        super().__init__()
        self.text_model, self.vision_model = TextModel(eos_token_id), nn.Identity()
        self.text_projection, self.logit_scale = nn.Linear(WIDTH, 8), nn.Parameter(torch.ones(()))

    def forward(self, text: Tensor, **options) -> Tensor:
        return self.text_projection(self.text_model(input_ids=text, **options).pooler_output)


def texts(lengths: list[int], end: int = WORDS - 1) -> Tensor:
    """(N, CONTEXT) token ids, each text with its end at ``lengths[n] - 1``."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(8, WORDS - 1, (length - 1,), generator=generator)
        row[length - 1] = end
    return tokens

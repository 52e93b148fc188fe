"""Attention between one image and all classes, as PROOF fuses them: what the images of a batch share is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Fused:
    """Outputs of the fusion: images (B, D), texts (C, D) and prototypes (C, D), the last two averaged over the images."""

    images: Tensor
    texts: Tensor
    prototypes: Tensor


@dataclass(frozen=True)
class Shared:
    """What all images of a batch have in common: tensors over the 2C classes' tokens, and over all S = 2C + K tokens.

    Attributes:
        classes, queries: (2C, D) tokens of texts and prototypes, and their queries over √D.
        keys, values: (S, D).
        scores: (2C, S); ``log_mass``: (2C, 1), its logsumexp.
        lines: (2C, D) what the classes attend to without an image, projected and centred.
        residuals: (2C, D) the same with residual and bias.
    """

    classes: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    log_mass: Tensor
    lines: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class ImageTokens:
    """The images' own tokens (B, D), their queries over √D, keys and values."""

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor


class CrossModalFusion(nn.Module):
    """One attention layer over ``[image; C texts; C prototypes; context prompts]``, for every image of a batch on its own.

    ``y = LN(x + dropout(W_o A + b_o))``, ``A = dropout(softmax(q kᵀ / √D)) v`` with one head. The sequences of two images differ
    in one token, which makes the attention among all others the same for all: a text c attends to image b with weight
    ``w_cb = sigmoid(q_c·k_b / √D − logsumexp_j q_c·k_j / √D)``, and its output before the normalisation lies on the line from
    the shared result to that image's value. Mean, variance and what follows are products of (C, D) and (D, B) matrices, so
    without dropout no (B, C, D) tensor is ever held and the attention of C × C is done once instead of B times. Outputs of the
    context prompts are used by nobody and not computed.

    Attributes:
        query, key, value: (D, D) without bias; ``output``: (D, D) with bias; ``norm``: LayerNorm over D.
        dropout: p, of attention weights and outputs in training mode.

    Source: Zhou et al., PROOF, TPAMI 2025.
    """

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), dropout
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_normal_(projection.weight)

    def forward(self, images: Tensor, texts: Tensor, prototypes: Tensor, context: Tensor) -> Fused:
        """Fuse projected and normalised features.

        Args:
            images: (B, D).
            texts, prototypes: (C, D).
            context: (K, D) prompts.

        Returns:
            Texts and prototypes averaged over the images, differentiable in everything.
        """
        shared, own = self.shared(texts, prototypes, context), self.image_tokens(images)
        classes = self.dense_classes(own, shared) if self._drops else self._mean_classes(own, shared)
        return Fused(self.image_outputs(own, shared), *classes.split(len(texts)))

    def image_tokens(self, images: Tensor) -> ImageTokens:
        """Queries, keys and values of projected ``images`` (B, D)."""
        return ImageTokens(images, images.shape[1] ** -0.5 * self.query(images), self.key(images), self.value(images))

    def shared(self, texts: Tensor, prototypes: Tensor, context: Tensor) -> Shared:
        """What does not depend on the images.

        Args:
            texts, prototypes: (C, D) projected and normalised.
            context: (K, D) prompts.
        """
        tokens = torch.cat([texts, prototypes, context])
        classes = tokens[: 2 * len(texts)]
        scale = tokens.shape[1] ** -0.5
        queries, keys, values = scale * self.query(classes), self.key(tokens), self.value(tokens)
        scores = queries @ keys.T
        own = F.linear(scores.softmax(dim=1) @ values, self.output.weight)
        return Shared(
            classes=classes,
            queries=queries,
            keys=keys,
            values=values,
            scores=scores,
            log_mass=scores.logsumexp(dim=1, keepdim=True),
            lines=_centred(own),
            residuals=_centred(classes + self.output.bias + own),
        )

    def scores(self, images: Tensor, shared: Shared, *, per_image: bool) -> Tensor:
        """``ĩ·t̃_c + ĩ·p̃_c`` (B, C) of ``images`` (B, D) with the classes of ``shared``, in evaluation mode.

        Args:
            images: projected image features.
            shared: of :meth:`shared`.
            per_image: t̃ and p̃ as they come out beside the image itself; or averaged over the batch.
        """
        own = self.image_tokens(images)
        outputs = self.image_outputs(own, shared)
        count = len(shared.classes) // 2
        if not per_image:
            classes = self._mean_classes(own, shared)
            return outputs @ (classes[:count] + classes[count:]).T
        weights, values, inverse = self._moments(own, shared)
        scaled = outputs * self.norm.weight
        towards = (scaled * values).sum(dim=1) - shared.lines @ scaled.T
        products = inverse * (shared.residuals @ scaled.T + weights * towards) + outputs @ self.norm.bias
        return (products[:count] + products[count:]).T

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def image_outputs(self, images: ImageTokens, shared: Shared) -> Tensor:
        """Outputs (B, D) at the position of the image."""
        alone = (images.queries * images.keys).sum(dim=1, keepdim=True)
        weights = self._drop(torch.cat([alone, images.queries @ shared.keys.T], dim=1).softmax(dim=1))
        attended = weights[:, :1] * images.values + weights[:, 1:] @ shared.values
        return self.norm(images.tokens + self._drop(self.output(attended)))

    def _moments(self, images: ImageTokens, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Weights w (2C, B) of the images, their centred values (B, D), and 1/σ (2C, B) of what the LayerNorm divides by σ."""
        values = _centred(F.linear(images.values, self.output.weight))
        weights = torch.sigmoid(shared.queries @ images.keys.T - shared.log_mass)
        lines, residuals = shared.lines, shared.residuals
        apart = values.square().sum(dim=1) - 2 * lines @ values.T + lines.square().sum(dim=1, keepdim=True)
        along = residuals @ values.T - (residuals * lines).sum(dim=1, keepdim=True)
        squares = residuals.square().sum(dim=1, keepdim=True) + weights * (2 * along + weights * apart)
        variance = squares.clamp(min=0) / values.shape[1]
        return weights, values, torch.rsqrt(variance + self.norm.eps)

    def _mean_classes(self, images: ImageTokens, shared: Shared) -> Tensor:
        """Outputs (2C, D) at texts and prototypes, averaged over the images."""
        weights, values, inverse = self._moments(images, shared)
        pull = weights * inverse
        mean = (
            shared.residuals * inverse.mean(dim=1, keepdim=True)
            - shared.lines * pull.mean(dim=1, keepdim=True)
            + pull @ values / len(values)
        )
        return torch.addcmul(self.norm.bias, self.norm.weight, mean)

    def dense_classes(self, images: ImageTokens, shared: Shared) -> Tensor:
        """Outputs (2C, D) at texts and prototypes, averaged over the images; any weight and output may be dropped.

        Holds (B, 2C, 2C + K + 1) weights.
        """
        alone = (images.keys @ shared.queries.T)[:, :, None]
        scores = torch.cat([alone, shared.scores.expand(len(alone), -1, -1)], dim=2)
        weights = self._drop(scores.softmax(dim=2))
        attended = weights[:, :, :1] * images.values[:, None] + weights[:, :, 1:] @ shared.values
        return self.norm(shared.classes + self._drop(self.output(attended))).mean(dim=0)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)

"""A CLIP model with its tokenizer and transforms: normalised features, exactly trimmed texts, class embeddings in one batch."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_methods import ranks
from cl_methods.backbone.micro_batches import Encoder, MicroBatches
from cl_methods.backbone.passes import Precision, TowerPass
from cl_methods.backbone.quick_gelu import fuse_quick_gelu
from cl_methods.backbone.read_out import read_out_of_images, reading
from cl_methods.backbone.self_attention import fuse_attention
from cl_methods.backbone.text_tower import TextTower
from cl_methods.backbone.transforms import Transform
from cl_methods.sharding import ShardedModel
from cl_methods.weights import WeightsOrigin

_TEXT_CHUNK = 1024

_WORTH_A_SEARCH = 64 << 20
"""Bytes of weights from which a copy that nobody needs any more is looked for: that goes through all objects of the process."""


class Backbone:
    """An open_clip model and what belongs to it.

    Where gradients are recorded, its residual blocks attend with the fewest operations
    (:func:`~cl_methods.backbone.self_attention.fuse_attention`), and QuickGELU keeps half as much
    (:mod:`cl_methods.backbone.quick_gelu`).

    Attributes:
        model: the open_clip model, its state-dict names unchanged.
        tokenize: texts -> int64 (N, context) token ids on the CPU.
        train_transform, eval_transform: PIL image or uint8 (3, H, W) tensor -> float32 (3, R, R).
        device: where the model is.
        name: what was asked for, for logs.
        origin: where the weights come from; None for a model that was not loaded by :func:`load_backbone`.
        micro_batches: how many samples go through a tower together, to bound memory; None: all that a call is given.
        sharded: set where each process holds some rows of :attr:`model` alone (:mod:`cl_methods.sharding`).
        precision: of the towers where gradients are recorded: ``bf16`` computes under autocast, from fp32 weights to fp32 features
            and gradients. What needs no gradient (teachers, evaluation, cached features) is always computed in fp32.
        trims_last_block: whether what trains on it may leave out what the last blocks compute and nobody reads
            (:mod:`cl_methods.backbone.read_out`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[Sequence[str]], Tensor],
        train_transform: Transform,
        eval_transform: Transform,
        *,
        name: str,
        device: str | torch.device = "cpu",
        origin: WeightsOrigin | None = None,
    ) -> None:
        self.model: Any = model.to(device)
        fuse_attention(self.model)
        fuse_quick_gelu(self.model)
        self.tokenize, self.train_transform, self.eval_transform = tokenize, train_transform, eval_transform
        self.device, self.name, self.origin = torch.device(device), name, origin
        self.micro_batches: MicroBatches | None = None
        self.sharded: ShardedModel | None = None
        self.precision: Precision = "fp32"
        self.trims_last_block = True

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learnt log temperature: a scalar tensor."""
        return self.model.logit_scale.exp().squeeze()

    @property
    def text_tower(self) -> Any:
        """The module that holds ``token_embedding``, ``transformer`` and ``ln_final``: the model itself, or its ``text``."""
        return self._text.module

    def encode_images(self, images: Tensor, *, normalise: bool = True) -> Tensor:
        """L2-normalised features f / ||f||.

        Args:
            images: (B, 3, R, R) floating point; moved to the model's device.
            normalise: False for f itself.

        Returns:
            (B, d), differentiable in the model's parameters.

        Raises:
            ValueError: ``images`` is not (B, 3, H, W).
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected (B, 3, H, W), got {tuple(images.shape)}")
        features = self._encode(self._image_features, images.to(self.device, non_blocking=True), "images")
        return features / features.norm(dim=-1, keepdim=True) if normalise else features

    def encode_texts(self, tokens: Tensor, *, trimmed: bool = False, normalise: bool = True) -> Tensor:
        """L2-normalised text features; only the positions up to the last read-out position are computed.

        The text tower is causal and reads one position per text, so later positions cannot change the result: this equals the
        untrimmed model up to the rounding of smaller matrix products. Token ids on an accelerator are taken as trimmed
        (:meth:`trim_texts`), because looking at them would wait for the device.

        Args:
            tokens: (N, L) int64, L up to the context length.
            trimmed: whether ``tokens`` come from :meth:`trim_texts`, so that nobody has to look at them again.
            normalise: False for the features before normalisation.

        Returns:
            (N, d), differentiable in the model's parameters.

        Raises:
            ValueError: ``tokens`` is not (N, L) with L up to the context length.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self._text.context_length:
            raise ValueError(
                f"tokens: expected (N, L) with L <= {self._text.context_length}, got {tuple(tokens.shape)}"
            )
        encode = self._text_features if self.sharded is None else self.sharded.encode_texts
        features = self._encode(encode, tokens if trimmed else self.trim_texts(tokens), "texts")
        return features / features.norm(dim=-1, keepdim=True) if normalise else features

    def trim_texts(self, tokens: Tensor) -> Tensor:
        """``tokens`` (N, L) cut after the last read-out position and moved to the device; unchanged where that is not exact.

        Done on the CPU, once per set of texts, so that training steps neither compute padding nor wait for the device.
        """
        if tokens.device.type == "cpu" and len(tokens) and self._text.trimmable:
            tokens = tokens[:, : int(self._text.readout(tokens).max()) + 1]
        return tokens.to(self.device, non_blocking=True)

    @torch.no_grad()
    def frozen_text_features(self, tokens: Tensor, chunk: int = _TEXT_CHUNK, *, normalise: bool = True) -> Tensor:
        """:meth:`encode_texts` without gradient for any number of texts: up to ``chunk`` per pass, similar lengths together.

        Every process computes all of them: they are cached here and there, and who has them must not have to wait for others.

        Args:
            tokens: (N, L) int64 on the CPU.
            chunk: texts per pass; bounds memory.
            normalise: as there.

        Returns:
            (N, d).
        """
        with ranks.alone():
            return self._text_chunks(tokens, chunk, normalise)

    def _text_chunks(self, tokens: Tensor, chunk: int, normalise: bool) -> Tensor:
        if len(tokens) <= chunk:
            return self.encode_texts(tokens, normalise=normalise)
        order = self._text.readout(tokens).argsort(stable=True) if self._text.trimmable else torch.arange(len(tokens))
        features = torch.cat([self.encode_texts(tokens[rows], normalise=normalise) for rows in order.split(chunk)])
        return features[order.argsort().to(features.device)]

    @torch.no_grad()
    def prompt_features(self, tokens: Tensor) -> Tensor:
        """:meth:`frozen_text_features` of texts that begin alike: what several share is computed once.

        The same up to the rounding of other matrix products. Towers that look ahead, or carry blocks that may not treat
        all positions alike, and :attr:`micro_batches` fall back to rows.

        Args:
            tokens: (N, L) int64 on the CPU, N at least 1.

        Returns:
            (N, d).
        """
        divided = self.micro_batches is not None or self.sharded is not None
        if divided or not self._text.takes_trees:
            return self.frozen_text_features(tokens)
        features = self._text.tree_features(tokens, self.device)
        return features / features.norm(dim=-1, keepdim=True)

    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot classifier: mean over templates of normalised prompt features, normalised again.

        ``w_c ∝ Σ_p g(template_p(class_c))``. Prompts of all classes go through the text tower together, common beginnings once.

        Args:
            class_names: C names.
            templates: P prompts with one ``{}`` each.

        Returns:
            (C, d) without gradient.

        Raises:
            ValueError: no class, no template, or a template without ``{}``.
        """
        return self.class_embeddings_of([(class_names, templates)])[0]

    def class_embeddings_of(self, label_spaces: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Tensor]:
        """:meth:`class_embeddings` of several label spaces: all their different prompts go through the text tower together.

        Args:
            label_spaces: class names and templates of each.

        Returns:
            (C, d) for each label space, without gradient.

        Raises:
            ValueError: as there.
        """
        for class_names, templates in label_spaces:
            if not class_names or not templates:
                raise ValueError(f"expected class names and templates, got {len(class_names)} and {len(templates)}")
        prompts = [[prompt(template, name) for name in names for template in some] for names, some in label_spaces]
        rows = {text: row for row, text in enumerate(dict.fromkeys(text for some in prompts for text in some))}
        features = self.prompt_features(self.tokenize(list(rows)))
        found = []
        for (class_names, templates), texts in zip(label_spaces, prompts, strict=True):
            own = features[torch.tensor([rows[text] for text in texts], device=features.device)]
            mean = own.view(len(class_names), len(templates), -1).mean(dim=1)
            found.append(mean / mean.norm(dim=-1, keepdim=True))
        return found

    def frozen_copy(self) -> Backbone:
        """A copy with weights of its own that take no gradient, in evaluation mode; whole where this one is sharded."""
        if sum(value.nbytes for value in self.model.parameters()) >= _WORTH_A_SEARCH:
            gc.collect()  # blocks refer to themselves: the copy that this one replaces would stay until somebody notices
        model: Any = copy.deepcopy(self.model) if self.sharded is None else self.sharded.whole()
        model.eval().requires_grad_(False)
        frozen = Backbone(
            model,
            self.tokenize,
            self.train_transform,
            self.eval_transform,
            name=self.name,
            device=self.device,
            origin=self.origin,
        )
        frozen.micro_batches = self.micro_batches
        return frozen

    @property
    def _text(self) -> TextTower:
        return TextTower(self.model)

    def _image_features(self, images: Tensor) -> Tensor:
        with reading(read_out_of_images(self.model.visual) if self.trims_last_block else None):
            return self.model.encode_image(images)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return self._text.features(tokens, trims_last_block=self.trims_last_block)

    def _encode(self, encode: Encoder, batch: Tensor, kind: Literal["images", "texts"]) -> Tensor:
        tower = self.text_tower if kind == "texts" else self.model.visual
        sharded = self.sharded is not None
        way = TowerPass(tower, kind, self.name, self.device.type, self.micro_batches, self.precision, sharded)
        return way.encode(encode, batch)


def prompt(template: str, class_name: str) -> str:
    """``template`` with its one ``{}`` replaced by ``class_name``.

    Raises:
        ValueError: the template has no ``{}``.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template: expected exactly one '{{}}', got {template!r}")
    return template.replace("{}", class_name)

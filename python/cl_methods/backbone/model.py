"""A CLIP model with its tokenizer and transforms: normalised features, exactly trimmed texts, class embeddings in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_methods import lazy_open_clip, ranks
from cl_methods.backbone.micro_batches import Encoder, MicroBatches, Part, encode_in_parts
from cl_methods.backbone.quick_gelu import fuse_quick_gelu
from cl_methods.backbone.read_out import ReadOut, read_out_of_images, reading
from cl_methods.backbone.self_attention import fuse_attention
from cl_methods.backbone.text_trees import TextTrees, plant, takes_trees
from cl_methods.sharding import ShardedModel
from cl_methods.weights import WeightsOrigin, file_sha256, fingerprint

Transform = Callable[[Any], Tensor]
Precision = Literal["fp32", "bf16"]
_TEXT_CHUNK = 1024
MINI_WEIGHTS = "mini_model.safetensors"
"""File of a folder with weights of the embedded tiny model's architecture, which no configuration of open_clip describes."""


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
        return getattr(self.model, "text", self.model)

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
        if tokens.ndim != 2 or tokens.shape[1] > self._context_length:
            raise ValueError(f"tokens: expected (N, L) with L <= {self._context_length}, got {tuple(tokens.shape)}")
        encode = self._text_features if self.sharded is None else self.sharded.encode_texts
        features = self._encode(encode, tokens if trimmed else self.trim_texts(tokens), "texts")
        return features / features.norm(dim=-1, keepdim=True) if normalise else features

    def trim_texts(self, tokens: Tensor) -> Tensor:
        """``tokens`` (N, L) cut after the last read-out position and moved to the device; unchanged where that is not exact.

        Done on the CPU, once per set of texts, so that training steps neither compute padding nor wait for the device.
        """
        if tokens.device.type == "cpu" and len(tokens) and self._trimmable:
            tokens = tokens[:, : int(self._readout(tokens).max()) + 1]
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
        order = self._readout(tokens).argsort(stable=True) if self._trimmable else torch.arange(len(tokens))
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
        if divided or not self._trimmable or not takes_trees(self.text_tower.transformer):
            return self.frozen_text_features(tokens)
        trees = plant(tokens, self._readout(tokens) + 1)
        computed = [(self._tree_features(part.to(self.device)), texts) for part, texts in trees.parts()]
        order = torch.cat([texts for _, texts in computed]).argsort()
        features = torch.cat([features for features, _ in computed])[order.to(self.device)]
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

    def _encode(self, encode: Encoder, batch: Tensor, kind: str) -> Tensor:
        """``encode(batch)`` for a ``kind`` of batch, ``images`` or ``texts``: all at once, or as :attr:`micro_batches` says, and in
        shares where several processes compute together (:mod:`cl_methods.ranks`).
        """
        parts, total = self.micro_batches, len(batch)
        if self.precision == "bf16" and torch.is_grad_enabled():
            encode = partial(_in_bf16, encode, self.device.type)
        if parts is None and ranks.count() == 1:
            return encode(batch)
        self._check_uncoupled(kind, "micro_batches" if ranks.count() == 1 else "processes")
        # fewer samples than processes: everyone encodes all of them, and what is counted on the way counts once
        shared = total >= ranks.count() > 1
        rows = ranks.share(total) if shared else range(total)
        own = self._encode_parts(
            encode,
            batch[rows.start : rows.stop],
            Part(rows.start, len(rows), total, repeated=not shared and ranks.rank() > 0),
            kind,
        )
        return ranks.gather_rows(own, total) if shared else own

    def _encode_parts(self, encode: Encoder, batch: Tensor, place: Part, kind: str) -> Tensor:
        parts = self.micro_batches or MicroBatches()
        transformer = getattr(self._tower(kind), "transformer", None)
        return encode_in_parts(
            encode,
            batch,
            getattr(parts, kind if torch.is_grad_enabled() else f"frozen_{kind}"),
            blocks=getattr(transformer, "resblocks", ()) if parts.blocks else (),
            keep_last=parts.keep_last,
            place=place,
        )

    def _tower(self, kind: str) -> Any:
        return self.text_tower if kind == "texts" else self.model.visual

    def _check_uncoupled(self, kind: str, setting: str) -> None:
        """Refuse to cut a batch whose samples are normalised together."""
        modules = self._tower(kind).modules()
        coupling = next((module for module in modules if isinstance(module, _BatchNorm) and module.training), None)
        if coupling is not None:
            raise ValueError(
                f"{setting}: the {kind} of {self.name} are normalised over their batch ({type(coupling).__name__}), "
                "which cannot be cut into parts; expected a model without batch normalisation, or "
                + ("a budget that needs no parts" if setting == "micro_batches" else "one process")
            )

    @property
    def _context_length(self) -> int:
        return self.text_tower.context_length

    @property
    def _pool_type(self) -> str | None:
        tower = self.text_tower
        return getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)

    @property
    def _trimmable(self) -> bool:
        """Whether later positions cannot matter: a causal mask, and one read-out position found from the token ids."""
        tower = self.text_tower
        own_layout = all(hasattr(tower, part) for part in ("token_embedding", "positional_embedding", "ln_final"))
        causal = getattr(tower, "attn_mask", None) is not None and not getattr(tower, "use_pad_mask", False)
        plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "output_tokens", False)
        return own_layout and causal and plain and self._pool_type in ("argmax", "eos")

    @property
    def _end_id(self) -> int | None:
        tower = self.text_tower
        return getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))

    def _readout(self, tokens: Tensor) -> Tensor:
        """(N,) position at which each text is read."""
        if self._pool_type == "eos":
            return (tokens == torch.tensor(self._end_id)).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)

    def _image_features(self, images: Tensor) -> Tensor:
        with reading(read_out_of_images(self.model.visual) if self.trims_last_block else None):
            return self.model.encode_image(images)

    def _text_features(self, tokens: Tensor) -> Tensor:
        if not self._trimmable:
            return self.model.encode_text(tokens)
        tower, length = self.text_tower, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        with reading(ReadOut(partial(self._readout, tokens)) if self.trims_last_block else None):
            x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        if x.shape[1] < length:  # the last block computed nothing but the position that is read
            return self._projected(tower.ln_final(x)[:, 0])
        pool = lazy_open_clip.transformer.text_global_pool
        return self._projected(pool(tower.ln_final(x), tokens, self._pool_type, eos_token_id=self._end_id))

    def _tree_features(self, trees: TextTrees) -> Tensor:
        """Features (n, d) before normalisation of the texts in ``trees``."""
        tower = self.text_tower
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(trees.tokens).to(dtype) + tower.positional_embedding[trees.depths].to(dtype)
        block = tower.transformer.resblocks[0]
        x = tower.transformer(x, attn_mask=trees.mask(block.attn.num_heads, dtype))
        return self._projected(tower.ln_final(x[trees.rows, trees.places]))

    def _projected(self, x: Tensor) -> Tensor:
        projection = self.text_tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _in_bf16(encode: Encoder, device_type: str, batch: Tensor) -> Tensor:
    """``encode(batch)`` under autocast, in fp32 again; every call has its own 16-bit copies of the weights."""
    with torch.autocast(device_type, torch.bfloat16):
        features = encode(batch)
    return features.float()


def prompt(template: str, class_name: str) -> str:
    """``template`` with its one ``{}`` replaced by ``class_name``.

    Raises:
        ValueError: the template has no ``{}``.
    """
    if template.count("{}") != 1:
        raise ValueError(f"template: expected exactly one '{{}}', got {template!r}")
    return template.replace("{}", class_name)


def load_backbone(model: str, pretrained: str | None = None, *, device: str | torch.device = "cpu") -> Backbone:
    """The embedded tiny model (``"mini"``), or any open_clip model with weights on disk.

    Training images are cropped at random (90-100 % of the area, bicubic, no flip); evaluation images are resized and
    centre-cropped: the transforms of the published MTIL runs.

    Args:
        model: ``"mini"``, or an open_clip name such as ``"ViT-B-16-quickgelu"``, or ``"local-dir:PATH"``, a folder such as
            ``clk export`` writes.
        pretrained: path of a file in any form that :func:`cl_methods.weights.read_weights` reads, or an open_clip tag.
            None: only with ``"mini"`` and ``"local-dir:"``, which bring their weights.
        device: where to put the model.

    Raises:
        ValueError: the model's name is unknown, or weights are needed and not named; they do not fit the model, or were
            trained with another activation than it has.
        FileNotFoundError: the weights are neither on disk nor can they be downloaded.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if model == "mini" or (model.startswith("local-dir:") and (folder / MINI_WEIGHTS).is_file()):
        if pretrained is not None:
            raise ValueError(f"pretrained: {model!r} brings its own weights; got {pretrained!r}")
        from cl_methods.scenarios import mini

        network = mini.load_model() if model == "mini" else mini.load_model(folder / MINI_WEIGHTS)
        file = mini.CHECKPOINT if model == "mini" else folder / MINI_WEIGHTS
        origin = WeightsOrigin(
            model=model,
            source="embedded" if model == "mini" else str(file),
            form="safetensors",
            sha256=file_sha256(file),
            fingerprint=fingerprint(network.state_dict()),
            activation="GELU",
        )
        parts = network, mini.tokenize, mini.train_transform, mini.eval_transform
        return Backbone(*parts, name=model, device=device, origin=origin)
    from cl_methods.backbone.open_clip_loading import load_open_clip

    loaded, origin = load_open_clip(model, pretrained)
    return Backbone(*loaded, name=model, device=device, origin=origin)


def planned_weights(model: str, pretrained: str | None) -> str:
    """One line about the weights that :func:`load_backbone` would load: of those on disk where they come from, after loading them.

    Raises:
        ValueError, FileNotFoundError: as there, for what is on disk; a tag is not looked for, so that nothing is downloaded.
    """
    if pretrained is not None and model != "mini" and not Path(pretrained).is_file():
        from cl_methods.backbone.open_clip_loading import check_tag

        check_tag(model, pretrained)
        return f"weights of {model}: tag {pretrained!r} of open_clip, downloaded unless they are on disk"
    origin = load_backbone(model, pretrained).origin
    assert origin is not None
    return origin.sentence()

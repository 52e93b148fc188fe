"""``python -m cl_methods.scenarios.mini.pretrain``: pre-train the tiny CLIP on captioned generic images.

Nothing of the tasks is used: not their renderers, not the held-out shape-colour pairs, not the serif font, no real digit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

from cl_methods.scenarios.mini import captions
from cl_methods.scenarios.mini.generic import COLUMN, FACTS, KINDS, SHARES, render
from cl_methods.scenarios.mini.model import CHECKPOINT, build_model
from cl_methods.scenarios.mini.muon import Muon
from cl_methods.scenarios.mini.stream import Stream
from cl_methods.scenarios.mini.tokenizer import tokenize
from cl_methods.scenarios.mini.transforms import eval_transform

if TYPE_CHECKING:
    from open_clip.model import CLIP

_PRETRAIN_SEED = 404
"""First part of every stream's key here; tasks and reference set use others."""


@dataclass(frozen=True)
class PretrainConfig:
    """The recipe of the published checkpoint.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step.
        captions: captions a step, written for images evenly spread over the batch; judged against all images.
        lr: peak learning rate of AdamW (embeddings, norms, biases, projections).
        muon_lr: peak learning rate of Muon (matrices of both transformers and the stem).
        warmup: steps of linear warm-up; then a cosine to zero.
        weight_decay: of AdamW.
        dense: weight of the phrase loss beside the contrastive loss.
        seed: of the initial weights and of every image and caption.
        output: where the checkpoint goes.
        log_every: steps between two lines of log.
    """

    steps: int = 1600
    batch_size: int = 256
    captions: int = 128
    lr: float = 2e-3
    muon_lr: float = 0.02
    warmup: int = 40
    weight_decay: float = 0.01
    dense: float = 2.0
    seed: int = 0
    output: Path = CHECKPOINT
    log_every: int = 50


@dataclass(frozen=True)
class Pairs:
    """A batch of generic images with captions: what is shown, what is said, and which caption is true of which image."""

    images: Tensor
    facts: Tensor
    kinds: Tensor
    tokens: Tensor
    positives: Tensor


def draw_pairs(config: PretrainConfig, step: int) -> Pairs:
    """The batch of a step: a pure function of the seed and the step."""
    stream = Stream(_PRETRAIN_SEED, config.seed, step)
    kinds = {kind: round(config.batch_size * SHARES[kind]) for kind in KINDS}
    images, facts, kind = render(kinds, stream)
    said = captions.mention(facts, stream)
    said = said[:: len(said) // config.captions][: config.captions]
    tokens = tokenize(captions.write(said, stream))
    positives = torch.from_numpy(captions.truth(facts, said))
    return Pairs(
        eval_transform(torch.from_numpy(images)), torch.from_numpy(facts), torch.from_numpy(kind), tokens, positives
    )


def draw_phrases(config: PretrainConfig, step: int) -> tuple[Tensor, dict[str, slice]]:
    """Tokens of one phrase for every value of every fact, each fact in a random template, and where each fact's phrases are."""
    stream = Stream(_PRETRAIN_SEED, config.seed, step, 1)
    texts: list[str] = []
    where = {}
    for fact in FACTS:
        template = captions.TEMPLATES[int(stream.integers(len(captions.TEMPLATES), 1)[0])]
        pick = int(stream.integers(12, 1)[0])
        options = captions.phrases(fact)
        where[fact] = slice(len(texts), len(texts) + len(options))
        texts += [template.format(option[pick % len(option)]) for option in options]
    return tokenize(texts), where


def encode_trimmed(model: CLIP, tokens: Tensor) -> Tensor:
    """Normalised text features (N, d), reading no further than the last end of text: exact, as the text tower is causal."""
    length = int(tokens.argmax(1).max()) + 1
    position = model.positional_embedding[:length]
    hidden = model.transformer(
        model.token_embedding(tokens[:, :length]) + position, attn_mask=model.attn_mask[:length, :length]
    )
    ends = model.ln_final(hidden[torch.arange(len(tokens)), tokens.argmax(1)])
    return normalize(ends @ model.text_projection, dim=-1)


def contrastive_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Symmetric contrastive loss with several positives: cross-entropy to the uniform distribution over the true pairs.

    Args:
        logits: (N, M) of images against captions.
        positives: (N, M) bool, at least one true in every column; images without a true caption have no row term.
    """
    target = positives.float()
    known = positives.any(1)
    images = -(log_softmax(logits[known], 1) * target[known] / target[known].sum(1, keepdim=True)).sum(1).mean()
    texts = -(log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (images + texts) / 2


def phrase_loss(logits: Tensor, pairs: Pairs, where: dict[str, slice]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of each fact over its own phrases, averaged over the images that show it; and accuracy in percent by fact.

    Numbers are learnt from images of kind "count" only, patterns from all others: elsewhere the answer is always the same.
    """
    losses, accuracy = [], {}
    for fact, place in where.items():
        target = pairs.facts[:, COLUMN[fact]]
        known = target >= 0
        if fact in ("count", "pattern"):
            known = known & ((pairs.kinds == KINDS.index("count")) == (fact == "count"))
        scores, target = logits[known, place], target[known]
        losses.append(cross_entropy(scores, target))
        accuracy[fact] = 100.0 * (scores.argmax(1) == target).float().mean().item()
    return torch.stack(losses).mean(), accuracy


def _optimisers(model: CLIP, config: PretrainConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and ("resblocks" in name or ("conv1" in name and "conv1.0" not in name))
        (hidden if matrix else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    return [(adamw, config.lr), (Muon(hidden, config.muon_lr), config.muon_lr)]


def _rate(step: int, config: PretrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def pretrain(config: PretrainConfig) -> CLIP:
    """Train the tiny CLIP from scratch and return it in evaluation mode.

    The loss is contrastive_loss + dense · phrase_loss, both on cosine logits times the learnt logit scale.
    The batches are the same everywhere; the weights agree between machines as far as their matrix products do.
    """
    torch.manual_seed(config.seed)
    model = build_model().train()
    optimisers = _optimisers(model, config)
    start = time.perf_counter()
    for step in range(config.steps):
        for optimiser, peak in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * _rate(step, config)
        pairs = draw_pairs(config, step)
        phrases, where = draw_phrases(config, step)
        image_features = model.encode_image(pairs.images, normalize=True)
        text_features = encode_trimmed(model, torch.cat([pairs.tokens, phrases]))
        logits = model.logit_scale.exp() * image_features @ text_features.T
        split = len(pairs.tokens)
        contrast = contrastive_loss(logits[:, :split], pairs.positives)
        dense, accuracy = phrase_loss(logits[:, split:], pairs, where)
        for optimiser, _ in optimisers:
            optimiser.zero_grad(set_to_none=True)
        (contrast + config.dense * dense).backward()
        for optimiser, _ in optimisers:
            optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            facts = " ".join(f"{name} {value:.0f}" for name, value in accuracy.items())
            seconds = time.perf_counter() - start
            print(
                f"{step + 1:5d} contrast {contrast.item():.3f} phrases {dense.item():.3f} | {facts} | {seconds:.0f} s",
                flush=True,
            )
    return model.eval()


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write the weights as float16 safetensors; the logit scale is rounded like the rest."""
    save_file({name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}, path)


def main() -> None:
    """Pre-train with the options of the command line and write the checkpoint."""
    config = tyro.cli(PretrainConfig, description=__doc__)
    model = pretrain(config)
    save_checkpoint(model, config.output)
    count = int(np.sum([parameter.numel() for parameter in model.parameters()]))
    print(f"{config.output}: {count:,} parameters, {config.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

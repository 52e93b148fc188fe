"""A step of MoE-Adapters as its public code takes it, in plain PyTorch: what ours is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.normal import Normal
from torch.nn import functional as F

from cl_methods.bench.agreement import in_double
from cl_methods.bench.own_step import COUNTED, OwnStep
from cl_methods.components.adapters import BlockAdapters, residual_blocks
from cl_methods.seeding import seed_everything, step_seed


class Expert(nn.Module):
    """``scale · dropout(relu(x W_downᵀ + b)) W_upᵀ + …`` on (n, L, D) tokens."""

    def __init__(self, adapters: BlockAdapters, index: int) -> None:
        super().__init__()
        _, rank, width = adapters.down_weight.shape
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale, self.dropout = adapters.scale, adapters.dropout
        with torch.no_grad():
            for layer, part in ((self.down, "down"), (self.up, "up")):
                layer.weight.copy_(getattr(adapters, f"{part}_weight")[index])
                layer.bias.copy_(getattr(adapters, f"{part}_bias")[index])

    def forward(self, x: Tensor) -> Tensor:
        """The branch of one expert on x (n, L, D), in the same shape."""
        hidden = F.dropout(F.relu(self.down(x)), self.dropout, self.training)
        return self.up(hidden) * self.scale


class Mixture(nn.Module):
    """Dense gates, a sort of their non-zeros, a loop over the experts, an index_add of their gated rows.

    The load-balancing loss is computed and thrown away, and activations are counted on the host.
    """

    def __init__(self, adapters: BlockAdapters, task: int) -> None:
        super().__init__()
        self.top_k, count = adapters.k, len(adapters.down_weight)
        self.router = nn.Parameter(adapters.routers[task].detach().clone())
        self.noise = nn.Parameter(adapters.noises[task].detach().clone())
        self.experts = nn.ModuleList(Expert(adapters, index) for index in range(count))
        self.noisy = True
        self.used: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        """The branch on x (B, L, D), in the same shape; samples are routed by their token 0."""
        gates = self._gates(x[:, 0])
        self._count(gates)
        chosen, order = torch.nonzero(gates).sort(0)
        expert = chosen[:, 1:]
        samples = torch.nonzero(gates)[order[:, 1], 0]
        sizes = (gates > 0).sum(0).tolist()
        weights = torch.gather(gates[samples], 1, expert)
        parts = [
            module(rows) for module, rows in zip(self.experts, x[samples].split(sizes, dim=0), strict=True) if len(rows)
        ]
        rows = torch.cat(parts, 0).flatten(1) * weights
        empty = torch.zeros(len(x), rows.shape[1], requires_grad=True, dtype=rows.dtype, device=x.device)
        return empty.index_add(0, samples, rows).view_as(x)

    def _gates(self, token: Tensor) -> Tensor:
        clean = token @ self.router
        logits = clean
        if self.noisy:
            spread = F.softplus(token @ self.noise) + 1e-2
            noise = torch.randn_like(clean, dtype=torch.float32)  # the same draws in float64
            logits = clean + noise * spread
        top, chosen = logits.topk(min(self.top_k + 1, logits.shape[1]), dim=1)
        kept = top[:, : self.top_k].softmax(1)
        gates = torch.zeros_like(logits, requires_grad=True).scatter(1, chosen[:, : self.top_k], kept)
        load = (
            self._load(clean, logits, spread, top) if self.noisy and top.shape[1] > self.top_k else (gates > 0).sum(0)
        )
        _squared_variation(gates.sum(0)) + _squared_variation(load)
        return gates

    def _load(self, clean: Tensor, noisy: Tensor, spread: Tensor, top: Tensor) -> Tensor:
        """Probability of being among the chosen under another draw of the noise, summed over the batch."""
        batch, count = clean.shape[0], top.shape[1]
        flat = top.flatten()
        place = torch.arange(batch, device=clean.device) * count + self.top_k
        inside = torch.gather(flat, 0, place).unsqueeze(1)
        outside = torch.gather(flat, 0, place - 1).unsqueeze(1)
        normal = Normal(torch.tensor([0.0], device=clean.device), torch.tensor([1.0], device=clean.device))
        if_in, if_out = normal.cdf((clean - inside) / spread), normal.cdf((clean - outside) / spread)
        return torch.where(torch.gt(noisy, inside), if_in, if_out).sum(0)

    def _count(self, gates: Tensor) -> None:
        self.used.update(torch.nonzero(gates)[:, 1].tolist())


class PublicMoEAdapters:
    """Cross-entropy over adapters in every block of both towers, class texts re-encoded at full length in every step.

    Source: restated from Yu et al., CVPR 2024, and the behaviour of its public code.

    Args:
        ours: the step of ours to mirror: its weights are copied.
        backbone: a fresh copy of the model.
        class_tokens: (C, context) int64, untrimmed.
    """

    def __init__(self, ours: OwnStep, backbone: Any, class_tokens: Tensor) -> None:
        method: Any = ours.method
        self.model, self.config, self.batch = backbone.model.requires_grad_(False), method.config, ours.batch
        self.class_tokens, self.task_index = class_tokens, ours.task_index
        hosts = residual_blocks(backbone, method.config.text_adapters)
        self.mixtures = nn.ModuleDict(
            {name: Mixture(adapters, method.router) for name, adapters in method.adapters.blocks.items()}
        ).to(self.batch.images.device)
        for name, block in hosts.items():
            block.forward = _Adapted(block, self.mixtures[name])
        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.mixtures.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=config.betas
        )

    def loss(self) -> Tensor:
        """The loss of the batch; the same noise as ours draws, which has the same order of blocks."""
        seed_everything(step_seed(0, self.task_index, COUNTED))
        images = self.model.encode_image(self.batch.images)
        texts = self.model.encode_text(self.class_tokens)
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        logits = self.model.logit_scale.exp() * images @ texts.T
        return F.cross_entropy(logits, self.batch.labels, label_smoothing=self.config.label_smoothing)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the gradients under our names, experts stacked; zero for an expert without samples."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        found = {}
        for place, mixture in self.mixtures.items():
            assert isinstance(mixture, Mixture)
            for layer in ("down", "up"):
                for part in ("weight", "bias"):
                    values = [getattr(getattr(expert, layer), part) for expert in mixture.experts]
                    found[f"{place}.{layer}_{part}"] = torch.stack(
                        [torch.zeros_like(value) if value.grad is None else value.grad for value in values]
                    )
            for own, name in (("router", "routers"), ("noise", "noises")):
                gradient = getattr(mixture, own).grad
                if gradient is not None:
                    found[f"{place}.{name}"] = gradient.clone()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), found

    def exact_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`gradients`, computed in float64."""
        batch = self.batch
        self.batch = replace(batch, images=batch.images.double())
        try:
            with in_double(self.model, self.mixtures):
                return self.gradients()
        finally:
            self.batch = batch

    def run(self) -> None:
        """The whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def on_device(self) -> Iterator[Tensor]:
        """Weights, buffers, texts and the batch."""
        yield from (*self.model.parameters(), *self.model.buffers(), *self.mixtures.parameters())
        yield from (self.class_tokens, self.batch.images, self.batch.labels)


class _Adapted:
    """The forward of a residual block with a mixture beside its MLP."""

    def __init__(self, block: Any, mixture: nn.Module) -> None:
        self.block, self.mixture = block, mixture

    def __call__(self, x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Tensor | None = None) -> Tensor:
        block = self.block
        x = x + block.ls_1(block.attention(q_x=block.ln_1(x), attn_mask=attn_mask))
        return x + block.ls_2(block.mlp(block.ln_2(x))) + self.mixture(x)


def _squared_variation(values: Tensor) -> Tensor:
    values = values.float()
    return values.var() / (values.mean() ** 2 + 1e-10)

"""Class texts as random variables: one adapter per task turns a class text into a normal distribution around it.

With ``h_c = t_c + v_c``, the text of class c and what it sees in images, the adapter i of the class's task gives

    ``q_c = N(μ_i(h_c), σ_i(h_c)²)``, ``μ_i(h) = W h + b``, ``σ_i(h) = 0.999 softplus(W' h + b') + 0.001``,

and draw f of the class's weight is ``h_c + z_cf``, ``z_cf ~ q_c``. The hierarchical form puts ``h_c + g_c`` in place of ``h_c``,
with ``g_c`` drawn from one more such distribution that all tasks share.

Priors of q_c: ``standard_normal``; ``language_aware``, the adapter's own distribution at the mean of the class's template texts; or
``data_driven``, the adapter's own distribution where the attention looked at a random part of the batch only.

Source: CLAP4CLIP (Jha et al., NeurIPS 2024), equations 5 to 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.components.visual_attention import VisualGuidedAttention
from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.class_layout import ClassLayout

Gaussian = tuple[Tensor, Tensor]
"""Mean and standard deviation of independent normal variables, of the same shape."""


@dataclass(frozen=True)
class Draws:
    """What one step draws, K = 1, in the hierarchical form K = G.

    Attributes:
        seen: (C, d), h: class texts and what they see.
        base: (K, C, d), what the adapters of the tasks are given.
        posterior: of z, both (K, C, d).
        samples: (F, K, C, d), draws of z.
        shared: posterior of the shared draws, both (1, C, d); None but in the hierarchical form.
        shared_samples: (G, C, d); None likewise.
    """

    seen: Tensor
    base: Tensor
    posterior: Gaussian
    samples: Tensor
    shared: Gaussian | None
    shared_samples: Tensor | None


class VariationalHead(nn.Module):
    """Attention, adapters of all tasks and the texts they start from; all tasks of a step in a few products.

    Args:
        width: d of the features.
        config: settings of the method.
        device: where everything is.

    Attributes:
        attention: what texts see in images; None without.
        adapters: for each task a linear map with weight (2 d, d), W over W', and bias (2 d,), b over b'.
        shared: the same for all tasks together in the hierarchical form, else None.
        texts: for each task (3, n, d): normalised mean over templates of normalised text features, that mean as it is, and
            the unbiased variance over templates.
    """

    def __init__(self, width: int, config: ClapConfig, device: torch.device) -> None:
        super().__init__()
        self.width, self.config, self.device = width, config, device
        hidden, dropout = config.attention_hidden, config.attention_dropout
        self.attention = VisualGuidedAttention(width, hidden, dropout) if config.visual_attention else None
        self.shared = nn.Linear(width, 2 * width) if config.hierarchical else None
        self.adapters = nn.ModuleList()
        self.to(device)
        self.texts: list[Tensor] = []
        self._frozen: tuple[list[int], Tensor, Tensor] | None = None

    def add_task(self, features: Tensor) -> None:
        """Take in a task's classes, and initialise its adapter from the texts of all classes so far.

        ``W = M^T M / d`` and ``W' = V^T V / d`` with the means and variances over templates of all classes as rows; b and b'
        as in ``nn.Linear``. One template has no variance: W' is zero then. With ``initialisation="random"`` all stay as there.

        Args:
            features: (n, P, d) normalised text features of n classes in P templates.

        Source: CLAP4CLIP (Jha et al., NeurIPS 2024), equations 9 and 10.
        """
        mean = features.mean(dim=1)
        variance = features.var(dim=1) if features.shape[1] > 1 else torch.zeros_like(mean)
        texts = [*self.texts, torch.stack([mean / mean.norm(dim=-1, keepdim=True), mean, variance])]
        self.append(texts[-1])
        if self.config.initialisation == "random":
            return
        means, variances = (torch.cat([one[part] for one in texts]) for part in (1, 2))
        with torch.no_grad():
            torch.div(torch.cat([means.T @ means, variances.T @ variances]), self.width, out=self._newest.weight)

    def append(self, texts: Tensor) -> None:
        """One more task, with ``texts`` (3, n, d) and an adapter whose weights are as ``nn.Linear`` makes them."""
        self.texts.append(texts.to(self.device))
        self.adapters.append(nn.Linear(self.width, 2 * self.width).to(self.device))
        sizes = [one.shape[1] for one in self.texts]
        self.layout, self._earlier = ClassLayout(sizes, self.device), ClassLayout(sizes[:-1], self.device)
        self.text, self.mean, _ = torch.cat(self.texts, dim=1)

    def draw(self, features: Tensor, *, every_task: bool, noise: tuple[Tensor, ...] | None = None) -> Draws:
        """Draw the texts of all classes of all tasks for a batch of images.

        Args:
            features: (B, d) normalised image features; the attention looks at all of them.
            every_task: whether all adapters train and the attention does not (second stage); else the attention trains and
                of the adapters the newest.
            noise: standard normal (F, C, d), in the hierarchical form (F, G, C, d) and (G, C, d); drawn if None.
        """
        seen = self.look(features, trains=not every_task)
        base, shared, shared_samples = seen[None], None, None
        if self.shared is not None:
            shared = gaussian(self.shared(base))
            shape = (self.config.global_samples, *seen.shape)
            shared_samples = torch.addcmul(
                *shared, torch.randn(shape, device=seen.device) if noise is None else noise[1]
            )
            base = base + shared_samples
        posterior = self.posterior(base, every_task)
        shape = (self.config.samples, *base.shape)
        draws = torch.randn(shape, device=seen.device) if noise is None else noise[0].view(-1, *base.shape)
        return Draws(seen, base, posterior, torch.addcmul(*posterior, draws), shared, shared_samples)

    def look(self, features: Tensor, *, trains: bool) -> Tensor:
        """``h = t + v`` (C, d) of all classes, v being what they see in the images with ``features`` (B, d)."""
        if self.attention is None:
            return self.text
        self.attention.train(trains)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self.text + self.attention(self.text, features, self.layout.mask)

    def posterior(self, base: Tensor, every_task: bool) -> Gaussian:
        """q at ``base`` (K, C, d), each class by its task's adapter; the gradient goes to those that train."""
        if every_task:
            return gaussian(_grouped(base, *_stack(self.adapters), self.layout))
        count = len(self._earlier.places)
        parts = [_grouped(base[:, :count], *self._earlier_adapters(), self._earlier)] if count else []
        return gaussian(torch.cat([*parts, self._newest(base[:, count:])], dim=1))

    def own(self, every_task: bool) -> slice:
        """Classes that the regularisers of a step concern: all, or those of the newest task."""
        return slice(0 if every_task else len(self._earlier.places), None)

    def at(self, base: Tensor, every_task: bool) -> Gaussian:
        """:meth:`posterior` at ``base`` (K, C, d) for the classes of :meth:`own` only."""
        if every_task:
            return self.posterior(base, every_task)
        return gaussian(self._newest(base[:, self.own(every_task)]))

    @property
    def _newest(self) -> nn.Linear:
        adapter = self.adapters[-1]
        assert isinstance(adapter, nn.Linear)
        return adapter

    def _earlier_adapters(self) -> tuple[Tensor, Tensor]:
        """All adapters but the newest, stacked; again only after one of them has changed."""
        earlier = self.adapters[:-1]
        versions = [value._version for value in earlier.parameters()]
        if self._frozen is None or self._frozen[0] != versions:
            with torch.no_grad():
                self._frozen = (versions, *_stack(earlier))
        return self._frozen[1:]

    @torch.no_grad()
    def score(self, features: Tensor, place: int, *, alone: bool, noise: tuple[Tensor, ...] | None = None) -> Tensor:
        """``x · (h + z)`` of images against the classes of one task: (1, B, n) for the mean of z, or (F, B, n) for draws.

        The mean is exact: μ is affine, so the mean weight is ``h + μ(h)`` (hierarchical: with ``h + μ_shared(h)`` for h), and
        ``x · (h + W h + b) = (x + Wᵀ x) · h + x · b``. Classes of other tasks cannot matter, for texts of different tasks do
        not look at each other.

        Args:
            features: x (B, d), normalised.
            place: number of the task.
            alone: whether the texts look at each image alone, or at all of ``features``.
            noise: standard normal (F, n, d), in the hierarchical form (F, G, n, d) and (G, n, d), which gives (G F, B, n); the
                mean if None.
        """
        seen = self._seen(features, place, alone)
        if noise is None:
            directions, offsets = self._fold(features, self.adapters[place])
            if self.shared is not None:
                directions, more = self._fold(directions, self.shared)
                offsets = offsets + more
            return (_products(directions, seen) + offsets)[None]
        if self.shared is None:
            return self._score_draws(features, seen, place, noise[0])
        shared = gaussian(self.shared(seen))
        bases = (seen + torch.addcmul(*shared, draw) for draw in noise[1])
        return torch.cat([self._score_draws(features, base, place, noise[0][:, g]) for g, base in enumerate(bases)])

    def _seen(self, features: Tensor, place: int, alone: bool) -> Tensor:
        """h (1, n, d) of one task for all images together, or (B, n, d) for each ``alone``."""
        text = self.texts[place][0]
        if self.attention is None:
            return text[None]
        self.attention.eval()
        look, mask = (self.attention.alone if alone else self.attention), text.new_zeros(len(text), len(text))
        return text + (look(text, features, mask) if alone else look(text, features, mask)[None])

    def _fold(self, directions: Tensor, adapter: nn.Module) -> tuple[Tensor, Tensor]:
        """``x + Wᵀ x`` (B, d) and ``x · b`` (B, 1): what μ does to a text, done to the images instead."""
        weight, bias = (part[: self.width] for part in adapter.parameters())
        return torch.addmm(directions, directions, weight), directions @ bias[:, None]

    def _score_draws(self, features: Tensor, base: Tensor, place: int, noise: Tensor) -> Tensor:
        """(F, B, n) for ``base`` (1 or B, n, d) and ``noise`` (F, n, d)."""
        mean, deviation = gaussian(self.adapters[place](base))
        mean = _products(features, base + mean)
        if len(base) == 1:
            return mean + torch.einsum("bd,fnd->fbn", features, deviation * noise)
        return mean + torch.einsum("bnd,fnd->fbn", features[:, None] * deviation, noise)


def gaussian(outputs: Tensor) -> Gaussian:
    """Mean and standard deviation, both (K, C, d), from an adapter's ``outputs`` (K, C, 2·d)."""
    mean, raw = outputs.chunk(2, dim=-1)
    return mean, torch.rsub(F.softplus(raw), 0.001, alpha=-0.999)  # 0.001 + 0.999 softplus, in one operation


def _stack(adapters: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """Weights (T, 2 d, d) and biases (T, 2 d) of the adapters."""
    parameters = tuple(adapters.parameters())
    return torch.stack(parameters[::2]), torch.stack(parameters[1::2])


def _grouped(base: Tensor, weights: Tensor, biases: Tensor, layout: ClassLayout) -> Tensor:
    """(K, C, 2 d): each class of ``base`` (K, C, d) through its task's (2 d, d) of ``weights`` (T, 2 d, d)."""
    draws, _, width = base.shape
    tasks, widest = layout.padded.shape
    rows = base[:, layout.padded].transpose(0, 1).reshape(tasks, draws * widest, width)
    outputs = torch.baddbmm(biases[:, None], rows, weights.transpose(1, 2)).view(tasks, draws, widest, 2 * width)
    return outputs.transpose(0, 1).reshape(draws, tasks * widest, 2 * width)[:, layout.places]


def _products(directions: Tensor, texts: Tensor) -> Tensor:
    """(B, n): ``directions`` (B, d) with ``texts`` (1, n, d), or each with its own of (B, n, d)."""
    if len(texts) == 1:
        return directions @ texts[0].T
    return (texts @ directions[:, :, None]).squeeze(2)

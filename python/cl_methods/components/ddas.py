"""Which task does an image belong to? Autoencoders on frozen features, one per task and one for generic data (DDAS)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_field, check_finite
from cl_methods.components.autoencoders import AutoEncoder, reconstruction_errors
from cl_methods.components.frozen_features import Extractor, alexnet_features, backbone_features
from cl_methods.components.image_batch import ImageBatch
from cl_methods.components.source_features import source_features
from cl_methods.datasets.images import ImageSource, Subset
from cl_methods.datasets.loading import read_images
from cl_methods.seeding import host_seed

_CACHE_BYTES = 1 << 30
_CHUNK = 256
_STATISTICS = 2048


@dataclass(frozen=True)
class DDASConfig:
    """Settings of the detector; the published ones by default, which need AlexNet weights on disk.

    Attributes:
        features: ``alexnet`` conv5 before its ReLU (published), or early statistics of the frozen ``backbone`` (no weights).
        alexnet_weights: path of torchvision's AlexNet state dict.
        depth: blocks of the image tower before the statistics, for ``backbone``.
        code: width of the autoencoders' bottleneck.
        iterations, generic_iterations: Adam steps for a task's autoencoder and for the one on generic data.
        batch_size: images per step.
        lr, weight_decay: of Adam.
        decay_epochs: the rate falls tenfold every so many epochs.
        augment: train on randomly cropped images (published) instead of evaluation images.
        threshold: largest error at which an image still belongs to a task.
        relative: the threshold is in units of the winning autoencoder's mean error on held-out images of its own task, not
            one number for all (published).
        scope: ``sample`` decides for each image alone; ``batch`` once for the whole evaluation batch, as published, which
            uses that a batch holds one data set only.
    """

    features: Literal["alexnet", "backbone"] = "alexnet"
    alexnet_weights: str = ""
    depth: int = 0
    code: int = 100
    iterations: int = 301
    generic_iterations: int = 1001
    batch_size: int = 64
    lr: float = 0.01
    weight_decay: float = 1e-4
    decay_epochs: int = 10
    augment: bool = True
    threshold: float = 0.0655
    relative: bool = False
    scope: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        check_finite(self)
        check_field(self, "features", ("alexnet", "backbone"))
        check_field(self, "scope", ("sample", "batch"))
        for name in ("code", "iterations", "generic_iterations", "batch_size", "lr", "decay_epochs", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        check_at_least(self, 0, "depth", "weight_decay")


def decide(errors: Tensor, threshold: float | Tensor, scope: str) -> Tensor:
    """Task of each image: the autoencoder with the smallest error, or -1 for the plain model.

    -1 where the generic autoencoder (column 0) has the smallest error or the smallest error exceeds the threshold.

    Args:
        errors: (B, 1 + tasks) reconstruction errors, generic data in column 0.
        threshold: one for all, or (1 + tasks,), that of the winning autoencoder counts.
        scope: ``"sample"``: each row alone; ``"batch"``: the mean row decides for all.

    Returns:
        (B,) int64.

    Source: MoE-Adapters (Yu et al., CVPR 2024), section 3.3; the public code has batch scope.
    """
    if scope == "batch":
        errors = errors.mean(dim=0, keepdim=True).expand_as(errors)
    smallest, index = errors.min(dim=1)
    limit = threshold[index] if isinstance(threshold, Tensor) else threshold
    return torch.where(smallest > limit, -1, index - 1)


class DDAS(nn.Module):
    """Distribution discriminative auto-selector: one autoencoder per learnt task and one for generic data.

    Only trained autoencoders compete. Without generic data, column 0 never wins and the threshold alone protects unseen data.

    Args:
        backbone: frozen; its own features, or the device for AlexNet's.
        config: settings.
    """

    def __init__(self, backbone: Backbone, config: DDASConfig) -> None:
        super().__init__()
        self.config = config
        self._backbone = [backbone]  # in a list, so that it is no sub-module
        self.extractor: Extractor = (
            alexnet_features(config.alexnet_weights, backbone.device)
            if config.features == "alexnet"
            else backbone_features(backbone, config.depth)
        )
        self.generic: AutoEncoder | None = None
        self.tasks = nn.ModuleList()
        self.register_buffer("shift", torch.zeros(0))
        self.register_buffer("spread", torch.zeros(0))

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """z (B, D) = sigmoid of the (standardised, if the extractor asks for it) features of images (B, 3, R, R)."""
        return self._squash(self.extractor.features(images))

    def _squash(self, features: Tensor) -> Tensor:
        if self.extractor.standardise:
            features = (features - self.shift) / self.spread
        return torch.sigmoid(features)

    def features_of(self, images: ImageBatch) -> Tensor:
        """The extractor's features (B, D) of a batch; the extractor is frozen."""
        return images.frozen("detector", self.extractor.features)

    @torch.no_grad()
    def errors(self, images: Tensor) -> Tensor:
        """(B, 1 + tasks) reconstruction errors of ``images`` (B, 3, R, R); infinite in column 0 without generic data."""
        return self._errors(ImageBatch(images))

    def _errors(self, images: ImageBatch) -> Tensor:
        """Each autoencoder looks at an image once: neither changes any more. Those that have not yet look at it together."""
        coders = ([] if self.generic is None else [self.generic]) + list(self._coders())
        if not coders:
            return torch.full((len(images), 1), torch.inf, device=self._backbone[0].device)
        names = [f"error {coder.digest(self.shift, self.spread)}" for coder in coders]
        columns = {name: images.kept(name) for name in names}
        missing = [place for place, name in enumerate(names) if columns[name] is None]
        if missing:
            found = reconstruction_errors([coders[place] for place in missing], self._squash(self.features_of(images)))
            for place, column in zip(missing, found.unbind(1), strict=True):
                columns[names[place]] = column
                images.keep(names[place], column)
        known = [column for column in (columns[name] for name in names) if column is not None]
        if self.generic is None:
            known.insert(0, torch.full_like(known[0], torch.inf))
        return torch.stack(known, dim=1)

    def _coders(self) -> Iterator[AutoEncoder]:
        for coder in self.tasks:
            assert isinstance(coder, AutoEncoder)
            yield coder

    @torch.no_grad()
    def decide(self, images: Tensor) -> Tensor:
        """(B,) int64: task of each of the ``images`` (B, 3, R, R), -1 for the plain model; -1 throughout before the first task."""
        return self.decide_batch(ImageBatch(images))

    @torch.no_grad()
    def decide_batch(self, images: ImageBatch) -> Tensor:
        """:meth:`decide` for a batch whose errors may be kept from earlier decisions."""
        if not len(self.tasks):
            return torch.full((len(images),), -1, device=self._backbone[0].device)
        threshold: float | Tensor = self.config.threshold
        if self.config.relative:
            units = torch.stack([coder.unit for coder in self._coders()])
            threshold = threshold * torch.cat([units.new_full((1,), torch.inf), units])
        return decide(self._errors(images), threshold, self.config.scope)

    def learn_generic(self, images: ImageSource) -> None:
        """Train the autoencoder of generic data, column 0."""
        self.generic = self._learn(images, None, self.config.generic_iterations)

    def learn_task(self, index: int, train: ImageSource, held_out: ImageSource) -> None:
        """Train the autoencoder of the ``index``-th task on its training images.

        Raises:
            ValueError: tasks are learnt out of order.
        """
        if index != len(self.tasks):
            raise ValueError(f"index: expected the next task, {len(self.tasks)}, got {index}")
        self.tasks.append(self._learn(train, held_out, self.config.iterations))

    def _learn(self, source: ImageSource, held_out: ImageSource | None, iterations: int) -> AutoEncoder:
        """A new autoencoder; without held-out images a tenth of the source is kept apart."""
        if held_out is None or not len(held_out):
            apart = max(1, len(source) // 10)
            order = torch.randperm(len(source))
            source, held_out = Subset(source, order[apart:]), Subset(source, order[:apart])
        if not len(self.shift):
            self._standardise(source)
        coder = AutoEncoder(len(self.shift), self.config.code).to(self._backbone[0].device)
        optimizer = torch.optim.Adam(coder.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        epoch = max(1, len(source) // self.config.batch_size)
        for step, z in enumerate(self._batches(source, iterations)):
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * 0.1 ** (step // epoch // self.config.decay_epochs)
            optimizer.zero_grad(set_to_none=True)
            (coder(z) - z).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            coder.unit.copy_(coder.errors(self._all(held_out)).mean())
        return coder.requires_grad_(False)

    def _standardise(self, source: ImageSource) -> None:
        """Fix shift and spread of every feature from the first data seen; the width of the features too."""
        features = self._fixed_features(Subset(source, torch.randperm(len(source))[:_STATISTICS]))
        self.shift = features.mean(dim=0)
        self.spread = features.std(dim=0).clamp(min=1e-6)

    @torch.no_grad()
    def _features(self, source: ImageSource, rows: Tensor, augment: bool) -> Tensor:
        """Of one batch (B, D). Several processes read and encode a share each; augmentation belongs to the place in the batch."""
        backbone, total = self._backbone[0], len(rows)
        seeds = torch.randint(1 << 62, (total,)).tolist() if augment else []
        shared = total >= ranks.count() > 1
        own = ranks.share(total) if shared else range(total)
        if augment:
            images = torch.stack([self._augmented(source, int(rows[place]), seeds[place]) for place in own])
        else:
            images = read_images(source, rows[own.start : own.stop].tolist(), backbone.eval_transform)
        features = self.extractor.features(images.to(backbone.device))
        return ranks.gather_rows(features, total) if shared else features

    def _augmented(self, source: ImageSource, row: int, seed: int) -> Tensor:
        with host_seed(seed):
            image: Tensor = self._backbone[0].train_transform(source.image(row))
        return image

    @torch.no_grad()
    def _fixed_features(self, source: ImageSource) -> Tensor:
        """Of all evaluation images (N, D), in whole batches that are dealt out to the processes."""
        backbone = self._backbone[0]
        return source_features(
            self.extractor.features, source, backbone.eval_transform, batch_size=_CHUNK, device=backbone.device
        )

    def _all(self, source: ImageSource) -> Tensor:
        return self._squash(self._fixed_features(source))

    def _batches(self, source: ImageSource, iterations: int) -> Iterator[Tensor]:
        """``iterations`` batches of inputs, every image once per epoch; features are kept where they fit and are fixed."""
        size = min(self.config.batch_size, len(source))
        fits = len(source) * len(self.shift) * 4 <= _CACHE_BYTES
        cached = self._all(source) if fits and not self.config.augment else None
        queue = torch.zeros(0, dtype=torch.int64)
        for _ in range(iterations):
            if len(queue) < size:
                queue = torch.randperm(len(source))
            chosen, queue = queue[:size], queue[size:]
            if cached is not None:
                yield cached[chosen.to(cached.device)]
            else:
                yield self._squash(self._features(source, chosen, self.config.augment))

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore ``state_dict()`` into a detector that may have learnt less or more."""
        self.shift, self.spread = state["shift"], state["spread"]
        count = len({name.split(".")[1] for name in state if name.startswith("tasks.")})
        new = lambda: AutoEncoder(len(self.shift), self.config.code).to(self.shift.device).requires_grad_(False)  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            self.generic = new() if any(name.startswith("generic.") for name in state) else None
            self.tasks = nn.ModuleList([new() for _ in range(count)])
        self.load_state_dict(state)

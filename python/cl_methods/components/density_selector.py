"""Which task does an image belong to? The one under whose density of frozen features it is most likely, or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_field, check_finite
from cl_methods.components.densities import Density, Gaussian, KernelDensity, LowRankGaussian
from cl_methods.components.frozen_features import Extractor, backbone_features
from cl_methods.components.image_batch import PLAIN, ImageBatch
from cl_methods.components.source_features import source_features
from cl_methods.datasets.images import ImageSource, Subset

_BATCH = 256


@dataclass(frozen=True)
class DensityConfig:
    """Settings of the selector. None were published for CLIP.

    Attributes:
        features: early ``statistics`` of the frozen image tower, or its final normalised ``embedding``.
        depth: blocks of the image tower before the statistics.
        density: ``gaussian``, ``low_rank`` (a Gaussian whose covariance is) or ``kernel``.
        shrinkage: share of the covariance that is replaced by a multiple of the identity.
        rank: of the covariance, for ``low_rank``.
        bandwidth: of the kernels, in standardised features; 0 is chosen on held-out images.
        centres: stored features per task at most, for ``kernel``.
        threshold: an image whose log density is more than so many standard deviations below the mean of held-out images
            belongs to no task.
        scope: ``sample`` decides for each image alone; ``batch`` by the mean log densities of the evaluation batch.
    """

    features: Literal["statistics", "embedding"] = "statistics"
    depth: int = 0
    density: Literal["gaussian", "low_rank", "kernel"] = "gaussian"
    shrinkage: float = 0.01
    rank: int = 32
    bandwidth: float = 0.0
    centres: int = 2000
    threshold: float = 4.0
    scope: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        check_finite(self)
        check_field(self, "features", ("statistics", "embedding"))
        check_field(self, "density", ("gaussian", "low_rank", "kernel"))
        check_field(self, "scope", ("sample", "batch"))
        for name in ("rank", "centres", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 <= self.shrinkage < 1:
            raise ValueError(f"shrinkage: expected 0 <= value < 1, got {self.shrinkage}")
        check_at_least(self, 0, "depth", "bandwidth")


def with_held_out(train: ImageSource, held_out: ImageSource | None) -> tuple[ImageSource, ImageSource]:
    """``train`` and ``held_out``; where there are fewer than two of the latter, a random tenth of the former is held out."""
    if held_out is not None and len(held_out) >= 2:
        return train, held_out
    order, count = torch.randperm(len(train)), max(2, len(train) // 10)
    return Subset(train, order[count:]), Subset(train, order[:count])


def decide(densities: Tensor, typical: Tensor, threshold: float, scope: str) -> Tensor:
    """Task of each image: the column with the highest log density, or -1 for none.

    -1 where generic data (column 0) is the most likely, or where the highest log density is more than ``threshold`` standard
    deviations below what is typical of its task.

    Args:
        densities: (B, 1 + tasks) log densities, generic data in column 0.
        typical: (1 + tasks, 2), mean and standard deviation of each column over held-out images of its own data.
        threshold: in standard deviations.
        scope: ``"sample"``: each row alone; ``"batch"``: the mean row decides for all.

    Returns:
        (B,) int64.
    """
    if scope == "batch":
        densities = densities.mean(dim=0, keepdim=True).expand_as(densities)
    highest, index = densities.max(dim=1)
    mean, deviation = typical[index].unbind(dim=1)
    return torch.where(highest < mean - threshold * deviation, -1, index - 1)


class DensitySelector(nn.Module):
    """One density per learnt task and, where there is generic data, one for that; no training, no gradient.

    With equal shares of the tasks the most likely task has the highest density. The densities of different tasks are comparable
    because all are of the same features: a shift and a scale, taken from the first data seen, are shared.

    Stored: the densities (:mod:`~cl_methods.components.densities`); with ``kernel`` features of training images are among them.

    Args:
        backbone: frozen; plain while :meth:`decide` runs.
        config: settings.

    Raises:
        ValueError: a rank that is not below the width of the features.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, backbone: Backbone, config: DensityConfig) -> None:
        super().__init__()
        self.config = config
        self._backbone = [backbone]  # in a list, so that it is no sub-module
        self.extractor = (
            backbone_features(backbone, config.depth)
            if config.features == "statistics"
            else Extractor(
                lambda images: backbone.encode_images(images).float(),
                standardise=True,
                width=getattr(backbone.model.visual, "output_dim", None),
            )
        )
        width = self.extractor.width
        if config.density == "low_rank" and width is not None and config.rank >= width:
            raise ValueError(f"rank: expected less than the width of the features, {width}, got {config.rank}")
        self.generic: Density | None = None
        self.tasks = nn.ModuleList()
        self.register_buffer("shift", torch.zeros(0))
        self.register_buffer("spread", torch.zeros(0))

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """Standardised features (B, d) of ``images`` (B, 3, R, R)."""
        return (self.features_of(ImageBatch(images)) - self.shift) / self.spread

    def features_of(self, images: ImageBatch) -> Tensor:
        """The frozen features (B, d) of a batch, not standardised."""
        if self.config.features == "embedding":
            return images.frozen(PLAIN, self._backbone[0].encode_images).float()
        return images.frozen("detector", self.extractor.features)

    @torch.no_grad()
    def log_densities(self, images: Tensor) -> Tensor:
        """(B, 1 + tasks) log densities of ``images`` (B, 3, R, R); minus infinity in column 0 without generic data."""
        return self._log_densities(self.features_of(ImageBatch(images)))

    def _log_densities(self, features: Tensor) -> Tensor:
        features = (features - self.shift) / self.spread
        impossible = features.new_full((len(features),), -torch.inf)
        generic = impossible if self.generic is None else self.generic.log_prob(features)
        return torch.stack([generic, *(density.log_prob(features) for density in self._densities())], dim=1)

    @torch.no_grad()
    def decide(self, images: Tensor) -> Tensor:
        """(B,) int64: task of each of the ``images`` (B, 3, R, R), -1 for none; -1 throughout before the first task."""
        return self.decide_batch(ImageBatch(images))

    def decide_batch(self, images: ImageBatch) -> Tensor:
        """:meth:`decide` for a batch whose frozen features may be kept from earlier decisions."""
        if not len(self.tasks):
            return torch.full((len(images),), -1, device=self._backbone[0].device)
        return self.decide_features(self.features_of(images))

    @torch.no_grad()
    def decide_features(self, features: Tensor) -> Tensor:
        """:meth:`decide` from frozen ``features`` (B, d), not standardised."""
        if not len(self.tasks):
            return torch.full((len(features),), -1, device=features.device)
        rows = [density.typical for density in self._densities()]
        typical = torch.stack([torch.zeros_like(rows[0]), *rows])  # -1 wins with column 0 whatever is typical of it
        return decide(self._log_densities(features), typical, self.config.threshold, self.config.scope)

    def learn_generic(self, images: ImageSource) -> None:
        """Fit the density of generic data, column 0."""
        self.generic = self._learn(images, None)

    def learn_task(self, index: int, train: ImageSource, held_out: ImageSource) -> None:
        """Fit the density of the ``index``-th task to its training images; ``held_out`` ones say what is typical.

        Raises:
            ValueError: tasks are learnt out of order.
        """
        if index != len(self.tasks):
            raise ValueError(f"index: expected the next task, {len(self.tasks)}, got {index}")
        self.tasks.append(self._learn(train, held_out))

    @torch.no_grad()
    def _learn(self, source: ImageSource, held_out: ImageSource | None) -> Density:
        source, held_out = with_held_out(source, held_out)
        features, others = self._features(source), self._features(held_out)
        if not len(self.shift):
            self.shift, self.spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        features, others = ((part - self.shift) / self.spread for part in (features, others))
        density = self._fit(features, others).to(features.device)
        density.calibrate(others)
        return density

    def _fit(self, features: Tensor, held_out: Tensor) -> Density:
        config = self.config
        if config.density == "gaussian":
            return Gaussian(features, config.shrinkage)
        if config.density == "low_rank":
            return LowRankGaussian(features, config.rank, config.shrinkage)
        kept = torch.randperm(len(features))[: config.centres].to(features.device)
        return KernelDensity(features[kept], config.bandwidth, held_out)

    def _features(self, source: ImageSource) -> Tensor:
        backbone = self._backbone[0]
        encode, transform = self.extractor.features, backbone.eval_transform
        return source_features(encode, source, transform, batch_size=_BATCH, device=backbone.device)

    def _densities(self) -> Iterator[Density]:
        for density in self.tasks:
            assert isinstance(density, Density)
            yield density

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore ``state_dict()`` into a selector that may have learnt less or more.

        Raises:
            RuntimeError: the state is one of another kind of density.
        """
        device = self._backbone[0].device
        kind = {"gaussian": Gaussian, "low_rank": LowRankGaussian, "kernel": KernelDensity}[self.config.density]

        def load(prefix: str) -> Density:
            density = kind().to(device)
            parts = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            density.load(parts, device)
            return density

        self.shift, self.spread = state["shift"].to(device), state["spread"].to(device)
        count = len({name.split(".")[1] for name in state if name.startswith("tasks.")})
        self.generic = load("generic.") if any(name.startswith("generic.") for name in state) else None
        self.tasks = nn.ModuleList([load(f"tasks.{place}.") for place in range(count)])

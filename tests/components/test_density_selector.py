"""Densities against their definitions; the task selector: decisions, scopes, training, states, and as MoE-Adapters' detector."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images, transform
from torch import Tensor
from torch.distributions import MultivariateNormal
from trained import SHORT, check_resuming, learn, state

from cl_kernels.profile import ExtraMemory
from cl_methods.backbone import Backbone
from cl_methods.components import densities
from cl_methods.components.densities import Density, Gaussian, KernelDensity, LowRankGaussian
from cl_methods.components.density_selector import DensityConfig, DensitySelector, decide
from cl_methods.components.gaussian import fit_gaussian
from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import Batch, MoEAdapters
from cl_methods.methods.find import find_method

CONFIG = DensityConfig(rank=4, shrinkage=0.05)
KINDS = ("gaussian", "low_rank", "kernel")
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "density_selector.md"
NOTHING = TensorImages(torch.zeros(0, 3, 16, 16, dtype=torch.uint8))


def correlated(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mixing + 1


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_gaussian(shrinkage: float) -> None:
    features, test = correlated(60, 7), 2 * correlated(50, 7, 1)
    covariance = features.double().T.cov() + 1e-7 * torch.eye(7).double()
    level = covariance.diagonal().mean()
    expected = MultivariateNormal(
        features.double().mean(dim=0), (1 - shrinkage) * covariance + shrinkage * level * torch.eye(7).double()
    ).log_prob(test.double())
    torch.testing.assert_close(Gaussian(features, shrinkage).log_prob(test), expected.float(), rtol=1e-4, atol=1e-3)


def test_gaussian_of_fewer_images_than_dimensions() -> None:
    found = Gaussian(correlated(5, 7), 0.5).log_prob(correlated(20, 7, 1))
    assert found.isfinite().all()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_gaussian(rank: int) -> None:
    features, test = correlated(60, 7), 2 * correlated(50, 7, 1)
    mean, covariance = fit_gaussian(features, shrinkage=0.1)
    variances, vectors = torch.linalg.eigh(covariance)
    variances[:-rank] = variances[:-rank].mean()
    exact = MultivariateNormal(mean, vectors @ variances.diag() @ vectors.T)
    found = LowRankGaussian(features, rank, 0.1)
    torch.testing.assert_close(found.log_prob(test), exact.log_prob(test.double()).float(), rtol=1e-4, atol=1e-3)
    assert found.directions.shape == (rank, 7)
    with pytest.raises(ValueError, match="rank: expected less than the width of the features, 7, got 7"):
        LowRankGaussian(features, 7)


@pytest.mark.parametrize(("rows", "centres"), [(512, 2048), (7, 9), (50, 1)])
def test_kernel_density(rows: int, centres: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks, it is the mean of the kernels; far away it does not underflow."""
    monkeypatch.setattr(densities, "_ROWS", rows)
    monkeypatch.setattr(densities, "_CENTRES", centres)
    features, test = correlated(40, 5), correlated(30, 5, 1)
    test[0] += 100
    found = KernelDensity(features, 0.7)
    normal = torch.distributions.Normal(features.double(), 0.7)
    each = normal.log_prob(test.double()[:, None]).sum(dim=-1)
    torch.testing.assert_close(
        found.log_prob(test), (each.logsumexp(dim=1) - torch.tensor(40.0).log()).float(), rtol=1e-4, atol=1e-3
    )
    assert found.log_prob(test).isfinite().all()


def test_the_bandwidth_is_the_most_likely_of_those_tried() -> None:
    features, held_out = correlated(80, 5), correlated(40, 5, 1)
    found = KernelDensity(features, 0.0, held_out)
    best = found.log_prob(held_out).mean()
    for factor in (0.5, 2.0):
        assert KernelDensity(features, factor * float(found.bandwidth)).log_prob(held_out).mean() < best
    with pytest.raises(ValueError, match="bandwidth: 0 chooses one by held-out features; there are none"):
        KernelDensity(features)


def test_kernels_need_memory_for_a_block_only() -> None:
    """20,000 x 20,000 distances would take 1.6 GB."""
    found = KernelDensity(torch.randn(20_000, 8), 1.0)
    test = torch.randn(20_000, 8)
    found.log_prob(test[:2048])
    with ExtraMemory(test.device) as extra:
        found.log_prob(test)
    assert extra.bytes is None or extra.bytes < 400e6


def test_decisions() -> None:
    rows = torch.tensor([[1.0, 5.0, 2.0], [1.0, 2.0, 4.0], [9.0, 5.0, 5.0], [-9.0, -4.0, -5.0]])
    typical = torch.tensor([[0.0, 1.0], [5.0, 2.0], [6.0, 1.0]])
    assert decide(rows, typical, 3.0, "sample").tolist() == [0, 1, -1, -1]
    assert decide(rows, typical, 1.0, "sample").tolist() == [0, -1, -1, -1]
    assert decide(rows, typical, 5.0, "sample").tolist() == [0, 1, -1, 0]
    assert decide(rows, typical, 3.0, "batch").tolist() == [0] * 4
    assert decide(rows[2:], typical, 2.0, "batch").tolist() == [-1, -1]


def stack(source: TensorImages) -> Tensor:
    return torch.stack([transform(source.image(index)) for index in range(len(source))])


def selector(backbone: Backbone, config: DensityConfig) -> DensitySelector:
    """Knows generic data of medium brightness, a dark task and a bright one."""
    torch.manual_seed(0)
    found = DensitySelector(backbone, config)
    found.learn_generic(noise_images(80, 1, 1, 128))
    found.learn_task(0, noise_images(80, 2, 1, 60), noise_images(40, 3, 1, 60))
    found.learn_task(1, noise_images(80, 4, 1, 200), NOTHING)
    return found


@pytest.mark.parametrize("density", KINDS)
@pytest.mark.parametrize("features", ["statistics", "embedding"])
def test_images_are_told_apart(density: str, features: str, backbone: Backbone) -> None:
    found = selector(backbone, replace(CONFIG, density=density, features=features, threshold=8.0))
    for brightness, task in ((60, 0), (200, 1), (128, -1)):
        images = stack(noise_images(20, 50 + task, 1, brightness))
        assert (found.decide(images) == task).float().mean() > 0.9, brightness


@pytest.mark.parametrize("density", KINDS)
def test_the_threshold_protects_without_generic_data(density: str, backbone: Backbone) -> None:
    found = DensitySelector(backbone, replace(CONFIG, density=density))
    images = stack(noise_images(20, 8, 1, 128))
    assert found.decide(images).tolist() == [-1] * 20
    found.learn_task(0, noise_images(80, 2, 1, 60), noise_images(40, 3, 1, 60))
    assert found.decide(images).tolist() == [-1] * 20
    assert (found.decide(stack(noise_images(20, 9, 1, 60))) == 0).float().mean() > 0.9
    with pytest.raises(ValueError, match="index: expected the next task, 1, got 2"):
        found.learn_task(2, noise_images(20, 1, 1), NOTHING)


def test_sample_scope_ignores_the_rest_of_the_batch(backbone: Backbone) -> None:
    found = selector(backbone, CONFIG)
    mixed = stack(noise_images(12, 8, 1, 60))
    mixed[:2] = stack(noise_images(2, 9, 1, 200))
    apart = torch.cat([found.decide(image[None]) for image in mixed])
    assert torch.equal(found.decide(mixed), apart)
    assert len(apart.unique()) == 2
    found.config = replace(CONFIG, scope="batch", threshold=1e6)
    assert len(found.decide(mixed).unique()) == 1


@pytest.mark.parametrize("density", KINDS)
def test_state_round_trip(density: str, backbone: Backbone) -> None:
    config = replace(CONFIG, density=density)
    found, copy = selector(backbone, config), DensitySelector(backbone, config)
    images = stack(noise_images(6, 3, 1, 90))
    copy.load_state({name: value.clone() for name, value in found.state_dict().items()})
    assert torch.equal(copy.log_densities(images), found.log_densities(images))
    assert torch.equal(copy.decide(images), found.decide(images))
    again = selector(backbone, config).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in found.state_dict().items())
    copy.load_state(DensitySelector(backbone, config).state_dict())
    assert copy.generic is None
    assert len(copy.tasks) == 0
    other = DensitySelector(backbone, replace(CONFIG, density=KINDS[KINDS.index(density) - 1]))
    with pytest.raises(RuntimeError, match=r"state: expected .*, got"):
        other.load_state(found.state_dict())


def test_the_method_of_the_page_gives_images_the_map_of_their_task(
    tmp_path: Path, tasks: list[Task], reference: Reference, batches: Callable[..., list[Batch]]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "task_maps.py").write_text(code, encoding="utf-8")
    kind = find_method(f"{tmp_path / 'task_maps.py'}:TaskMaps")

    def build() -> Any:
        torch.manual_seed(0)
        config = kind.Config(**SHORT, density=replace(CONFIG, density="gaussian", threshold=8.0))
        return kind(build_backbone(), config, reference)

    check_resuming(build, tasks, batches)
    method = learn(build(), tasks, batches)
    plain = method.backbone.encode_images(stack(tasks[0].test))
    for index, task in enumerate(tasks):
        images = stack(task.test)
        own = method.mapped(method.backbone.encode_images(images), method.maps[index]).detach()
        rows = method.selector.decide(images) == index
        assert rows.float().mean() > 0.9
        logits = method.logits(images, task)
        torch.testing.assert_close(logits[rows], (method.backbone.logit_scale * own @ method.classifier(task).T)[rows])
        alone = torch.cat([method.logits(image[None], task) for image in images])
        torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    unlike = method.image_features(ImageBatch(stack(reference.images)))
    torch.testing.assert_close(unlike, method.backbone.encode_images(stack(reference.images)))
    assert plain.shape[1] == len(method.maps[0])


def test_settings_are_checked(backbone: Backbone) -> None:
    for name, value in (("rank", 0), ("centres", 0), ("threshold", 0), ("shrinkage", 1.0), ("bandwidth", -1.0)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
            DensityConfig(**{name: value})
    for name in ("features", "density", "scope"):
        with pytest.raises(ValueError, match=f"{name}: expected one of .*, got 'x'"):
            DensityConfig(**{name: "x"})
    with pytest.raises(ValueError, match="depth: expected 0 to 2, got 3"):
        DensitySelector(backbone, DensityConfig(depth=3))


@pytest.mark.parametrize("density", KINDS)
def test_moe_adapters_are_routed_by_density(
    density: str, tasks: list[Task], reference: Reference, batches: Callable[..., list[Batch]]
) -> None:
    settings: dict[str, Any] = {"lr": 2e-2, "iterations": 3, "warmup": 1, "experts": 5, "bottleneck": 8}
    selection = replace(CONFIG, density=density, threshold=8.0)

    def build() -> MoEAdapters:
        torch.manual_seed(0)
        config = MoEAdapters.Config(**settings, detection="density", density=selection)
        return MoEAdapters(build_backbone(), config, reference)

    method = learn(build(), tasks, batches)
    for index, task in enumerate(tasks):
        images = stack(task.test)
        assert (method.detector.decide(images) == index).float().mean() > 0.9
        with method.adapters.active(index):
            texts = method.backbone.class_embeddings(task.class_names, task.templates)
            own = method.backbone.logit_scale * method.backbone.encode_images(images) @ texts.T
        rows = method.detector.decide(images) == index
        torch.testing.assert_close(method.logits(images, task)[rows], own.detach()[rows], rtol=1e-4, atol=1e-4)
    check_resuming(build, tasks, batches)
    other = MoEAdapters(build_backbone(), MoEAdapters.Config(**settings, detection="none", routers="shared"))
    with pytest.raises(RuntimeError, match=r"'density\..*' is no tensor of moe_adapters with detection none"):
        other.load_state_dict(state(method))
    assert isinstance(method.detector.generic, Density)

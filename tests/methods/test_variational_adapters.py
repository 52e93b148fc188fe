"""CLAP4CLIP's head against a loop over tasks with torch.distributions and torch's own decoder layer, in float64; what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from cl_kernels.profile import OperationCount
from cl_methods.components.visual_attention import VisualGuidedAttention
from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.variational_adapters import VariationalHead
from cl_methods.methods.variational_loss import variational_loss

WIDTH, SIZES, SCALE = 12, (3, 1, 4), torch.tensor(7.0, dtype=torch.float64)


def build(sizes: tuple[int, ...] = SIZES, width: int = WIDTH, templates: int = 5, **settings: Any) -> VariationalHead:
    torch.manual_seed(0)
    small = {"attention_hidden": 20, "attention_dropout": 0.0, "samples": 3, "global_samples": 2}
    head = VariationalHead(width, ClapConfig(**{**small, **settings}), torch.device("cpu"))
    for size in sizes:
        head.add_task(F.normalize(torch.randn(size, templates, width), dim=-1))
    return head


def exact(head: VariationalHead) -> VariationalHead:
    """In float64, with weights that matter."""
    head.double()
    head.texts = [texts.double() for texts in head.texts]
    head.text, head.mean, _ = torch.cat(head.texts, dim=1)
    head.layout.mask = head.layout.mask.double()
    head.layout.shares = torch.cat([torch.full((size,), 1 / size, dtype=torch.float64) for size in head.layout.sizes])
    with torch.no_grad():
        for value in head.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return head


def images(count: int = 6, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)
    return features, torch.randint(sum(SIZES), (count,), generator=generator)


def noise_of(head: VariationalHead) -> tuple[Tensor, ...]:
    config, shape = head.config, (sum(SIZES), WIDTH)
    if not config.hierarchical:
        return (torch.randn(config.samples, *shape, dtype=torch.float64),)
    groups = torch.randn(config.samples, config.global_samples, *shape, dtype=torch.float64)
    return groups, torch.randn(config.global_samples, *shape, dtype=torch.float64)


def classes(head: VariationalHead) -> Iterator[tuple[int, slice]]:
    first = 0
    for place, texts in enumerate(head.texts):
        yield place, slice(first, first + texts.shape[1])
        first += texts.shape[1]


def look(head: VariationalHead, memory: Tensor) -> Tensor:
    """h, task after task through torch's own forward pass of the decoder layer."""
    if head.attention is None:
        return head.text
    parts = []
    for texts in head.texts:
        seen = nn.TransformerDecoderLayer.forward(head.attention, texts[0][None], memory[None])
        parts.append(texts[0] + seen[0])
    return torch.cat(parts)


def normal(adapter: nn.Module, base: Tensor) -> Normal:
    weight, bias = adapter.parameters()
    mean, raw = weight.chunk(2), bias.chunk(2)
    return Normal(base @ mean[0].T + raw[0], 0.999 * F.softplus(base @ mean[1].T + raw[1]) + 0.001)


def prior_of(head: VariationalHead, adapter: nn.Module, like: Tensor, context: Tensor, means: Tensor | None) -> Normal:
    kind = head.config.prior
    if kind == "data_driven":
        return normal(adapter, context)
    if kind == "language_aware" and means is not None:
        return normal(adapter, means)
    return Normal(torch.zeros_like(like), torch.ones_like(like))


def loss_by_definition(
    head: VariationalHead, features: Tensor, labels: Tensor, noise: tuple[Tensor, ...], every_task: bool, rows: Tensor
) -> dict[str, Tensor]:
    """One task and one draw at a time; ``rows`` are the images that the data-driven prior looks at."""
    config, seen, context = head.config, look(head, features), look(head, features[rows])
    divergence, apart = features.new_zeros(()), features.new_zeros(())
    bases, shared_noise = [seen], noise[1] if config.hierarchical else None
    if shared_noise is not None:
        shared = normal(head.shared, seen)
        bases = [seen + shared.mean + shared.stddev * draw for draw in shared_noise]
        divergence = divergence + kl_divergence(shared, prior_of(head, head.shared, seen, context, None)).mean(0).sum()
        drawn = torch.stack([base - seen for base in bases]).mean(0)
        apart = apart + F.cross_entropy(head.mean @ drawn.T, torch.arange(len(seen)))
    logits: list[list[Tensor]] = [[] for _ in range(config.samples * len(bases))]
    for place, own in classes(head):
        samples, divergences = [], []
        for g, base in enumerate(bases):
            posterior = normal(head.adapters[place], base[own])
            prior = prior_of(head, head.adapters[place], base[own], context[own], head.mean[own])
            divergences.append(kl_divergence(posterior, prior).mean(0).sum())
            for f in range(config.samples):
                draw = noise[0][f, g, own] if config.hierarchical else noise[0][f, own]
                samples.append(posterior.mean + posterior.stddev * draw)
                logits[f * len(bases) + g].append(SCALE * features @ (base[own] + samples[-1]).T)
        if every_task or place == len(head.texts) - 1:
            divergence = divergence + torch.stack(divergences).mean()
            similar = head.mean[own] @ torch.stack(samples).mean(0).T
            apart = apart + F.cross_entropy(similar, torch.arange(len(similar)))
    rows_of = [F.cross_entropy(torch.cat(parts, dim=1), labels) for parts in logits]
    terms = {
        "cross_entropy": torch.stack(rows_of).mean(),
        "kl": config.kl_weight * divergence,
        "past_task": config.past_task_weight * apart,
    }
    return {"loss": torch.stack(tuple(terms.values())).sum(), **terms}


@pytest.mark.parametrize("every_task", [False, True])
@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("prior", ["standard_normal", "language_aware", "data_driven"])
def test_loss_and_gradients(prior: str, hierarchical: bool, every_task: bool) -> None:
    head = exact(build(prior=prior, hierarchical=hierarchical, kl_weight=0.5, past_task_weight=0.8))
    features, labels = images()
    noise = noise_of(head)
    torch.manual_seed(5)
    found = variational_loss(head, features, labels, SCALE, every_task=every_task, noise=noise)
    torch.manual_seed(5)
    rows = torch.randperm(6)[:5]  # 0.67 of six, rounded up
    expected = loss_by_definition(head, features, labels, noise, every_task, rows)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    trained = {name: value for name, value in head.named_parameters() if trains(name, every_task)}
    gradients = torch.autograd.grad(expected["loss"], list(trained.values()))
    found["loss"].backward()
    for (name, value), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-8, atol=1e-9, msg=name)
    for name, value in head.named_parameters():
        assert (value.grad is None) == (name not in trained), name


def trains(name: str, every_task: bool) -> bool:
    if name.startswith("attention."):
        return not every_task
    return every_task or name.startswith(("shared.", f"adapters.{len(SIZES) - 1}."))


def test_terms_can_be_left_out() -> None:
    features, labels = images()
    head = exact(build(kl_weight=0.0, past_task_weight=0.0, visual_attention=False))
    assert head.attention is None
    noise = noise_of(head)
    found = variational_loss(head, features, labels, SCALE, every_task=True, noise=noise)
    assert found.keys() == {"loss", "cross_entropy"}
    expected = loss_by_definition(head, features, labels, noise, True, torch.arange(2))
    torch.testing.assert_close(found["loss"], expected["cross_entropy"])


def test_adapters_start_from_the_texts_of_all_classes_or_as_any_linear_map() -> None:
    heads = {kind: build(initialisation=kind) for kind in ("language_aware", "random")}
    means, variances = (torch.cat([texts[part] for texts in heads["random"].texts]) for part in (1, 2))
    expected = torch.cat([means.T @ means, variances.T @ variances]) / WIDTH
    torch.testing.assert_close(heads["language_aware"].adapters[-1].weight.detach(), expected)
    bound = WIDTH**-0.5
    found = heads["random"].adapters[-1].weight
    assert 0.9 * bound < found.abs().max() <= bound
    assert found.mean().abs() < 0.1 * bound


def test_one_template_has_no_variance() -> None:
    head = build(templates=1)
    assert all(value.isfinite().all() for value in head.parameters())
    assert not head.adapters[0].weight[WIDTH:].any()
    assert head.adapters[0].weight[:WIDTH].any()


def test_attention_in_training_mode_drops_at_the_same_places() -> None:
    """Without noise it equals torch's layer; with it, the same share of every part is zero in the mean."""
    torch.manual_seed(0)
    layer = VisualGuidedAttention(WIDTH, 16, dropout=0.4)
    texts, memory, mask = torch.randn(5, WIDTH), torch.randn(7, WIDTH), torch.zeros(5, 5)
    own = nn.TransformerDecoderLayer.forward(layer.eval(), texts[None], memory[None])[0]
    torch.testing.assert_close(layer(texts, memory, mask), own)
    layer.train()
    with torch.no_grad():
        ours = torch.stack([layer(texts, memory, mask) for _ in range(2000)])
        many = (part.expand(20_000, -1, -1) for part in (texts, memory))
        theirs = nn.TransformerDecoderLayer.forward(layer, *many)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.08)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0, atol=0.08)
    assert ours.std(0).min() > 0.1


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_scores(alone: bool, hierarchical: bool) -> None:
    """Of draws, image by image; and of the mean, which draws that cancel out have as theirs."""
    head = exact(build(hierarchical=hierarchical))
    features, _ = images()
    noise = noise_of(head)
    for place, own in classes(head):
        mine = tuple(part[..., own, :] for part in noise)
        found = head.score(features, place, alone=alone, noise=mine)
        for row in range(len(features)):
            seen = look(head, features[row : row + 1] if alone else features)[own]
            expected = []
            for g in range(head.config.global_samples if hierarchical else 1):
                base, draws = seen, mine[0]
                if hierarchical:
                    shared = normal(head.shared, seen)
                    base, draws = seen + shared.mean + shared.stddev * mine[1][g], mine[0][:, g]
                posterior = normal(head.adapters[place], base)
                weights = base + posterior.mean + posterior.stddev * draws
                expected.append(weights @ features[row])
            torch.testing.assert_close(found[:, row], torch.cat(expected), rtol=1e-9, atol=1e-9)
        both = [torch.cat([part, -part]) for part in mine]
        if hierarchical:
            both[0] = torch.cat([both[0], both[0]], dim=1)
        mean = head.score(features, place, alone=alone)
        torch.testing.assert_close(head.score(features, place, alone=alone, noise=tuple(both)).mean(0), mean[0])


def test_adapters_of_earlier_tasks_are_stacked_anew_when_they_change() -> None:
    head = build()
    base = torch.randn(1, sum(SIZES), WIDTH)
    before = head.posterior(base, every_task=False)[0]
    with torch.no_grad():
        head.adapters[0].bias.add_(1.0)
    after = head.posterior(base, every_task=False)[0]
    torch.testing.assert_close(after[:, :3], before[:, :3] + 1)
    assert torch.equal(after[:, 3:], before[:, 3:])


def test_a_step_dispatches_under_sixty_operations_forward() -> None:
    """However many tasks there are, with dropout; the public code's 10-task head dispatches 726, and 1,185 in the second stage."""
    for tasks in (2, 10):
        head = build(sizes=(4,) * tasks, attention_dropout=0.1)
        features, labels = images()
        features, scale = features.float(), SCALE.float()
        for every_task, forward, backward in ((False, 59, 105), (True, 53, 60)):
            variational_loss(head, features, labels, scale, every_task=every_task)
            with OperationCount() as there:
                loss = variational_loss(head, features, labels, scale, every_task=every_task)["loss"]
            with OperationCount() as back:
                loss.backward()
            assert there.operations <= forward, there.by_name
            assert back.operations <= backward, back.by_name

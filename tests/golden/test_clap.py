"""CLAP4CLIP's head on frozen features against the public code's: draws, every term of the loss, gradients, inference."""

from __future__ import annotations

from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import Tensor

from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.variational_adapters import VariationalHead
from cl_methods.methods.variational_loss import variational_loss

CASES = golden.names("clap_head*")
FORWARD, GRADIENT = 1e-5, 2e-5


def build(name: str) -> tuple[VariationalHead, dict[str, Tensor], dict[str, Any], list[Tensor]]:
    """The head with the weights of the file, its tensors and metadata, and the template texts (n, P, d) of each task."""
    tensors, meta = golden.load(name)
    attention = golden.under(tensors, "vga.")
    config = ClapConfig(
        attention_hidden=len(attention["linear1.bias"]),
        attention_dropout=0.0,
        samples=meta["F"],
        kl_weight=meta["kl_weight"],
        past_task_weight=meta["lasp_beta"],
    )
    head = VariationalHead(meta["D"], config, torch.device("cpu"))
    head.attention.load_state_dict(attention)
    texts = tensors["text_individual"].split(meta["task_sizes"])
    for place, features in enumerate(texts):
        head.add_task(features)
        with torch.no_grad():
            for part, value in head.adapters[place].named_parameters():
                value.copy_(torch.cat([tensors[f"{kind}.{place}.{part}"] for kind in ("mu", "sigma")]))
    return head, tensors, meta, list(texts)


@pytest.mark.parametrize("name", CASES)
def test_texts_and_initialisation(name: str) -> None:
    head, tensors, meta, texts = build(name)
    assert meta["current_task"] == len(texts) - 1
    assert golden.max_error(head.text, tensors["text"]) < FORWARD
    fresh = VariationalHead(meta["D"], head.config, torch.device("cpu"))
    for features in texts:
        fresh.add_task(features)
    mu, sigma = fresh.adapters[-1].weight.chunk(2)
    assert golden.max_error(mu, tensors["init.mu_weight"]) < FORWARD
    assert golden.max_error(sigma, tensors["init.sigma_weight"]) < FORWARD
    assert fresh.adapters[-1].bias.abs().max() <= meta["D"] ** -0.5


@pytest.mark.parametrize("stage", ["finetuning_False", "finetuning_True"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, stage: str) -> None:
    head, tensors, _, texts = build(name)
    expected = golden.under(tensors, f"{stage}.")
    every_task = stage.endswith("True")
    noise = (expected["eps"],)
    with torch.no_grad():
        draws = head.draw(tensors["image"], every_task=every_task, noise=noise)
        weights = (draws.base + draws.samples).squeeze(1)
        logits = tensors["logit_scale"] * tensors["image"] @ weights.mT
    assert golden.max_error(logits, expected["logits"]) < FORWARD
    terms = variational_loss(
        head, tensors["image"], tensors["labels"], tensors["logit_scale"], every_task=every_task, noise=noise
    )
    for ours, theirs in (("cross_entropy", "ce"), ("kl", "kl"), ("past_task", "lasp"), ("loss", "loss")):
        assert golden.max_error(terms[ours], expected[theirs]) < GRADIENT, ours
    terms["loss"].backward()
    checked = 0
    for place in range(len(texts)):
        for part, value in head.adapters[place].named_parameters():
            found = value.grad
            if not every_task and place < len(texts) - 1:
                assert found is None, "adapters of earlier tasks do not train in the first stage"
                continue
            wanted = torch.cat([expected[f"grad.{kind}.{place}.{part}"] for kind in ("mu", "sigma")])
            assert golden.relative_error(found, wanted) < GRADIENT, (place, part)
            checked += 1
    assert checked == (2 * len(texts) if every_task else 2)
    for key, parameter in head.attention.named_parameters():
        if every_task:
            assert parameter.grad is None, "the attention does not train in the second stage"
            continue
        rows = next(other for other in expected if other.endswith(f"vga.{key}"))
        found, wanted = parameter.grad[: len(expected[rows])], expected[rows]
        found, wanted = (golden.without_key_bias("attn." + key.rpartition(".")[2], one) for one in (found, wanted))
        assert golden.relative_error(found, wanted) < GRADIENT, key


@pytest.mark.parametrize("case", ["test", "test_single"])
@pytest.mark.parametrize("name", CASES)
def test_scores(name: str, case: str) -> None:
    """Task after task, as images are scored; looking at each image alone is the same as a batch of that image."""
    head, tensors, meta, _ = build(name)
    draws, expected = tensors[f"{case}.eps"].split(meta["task_sizes"], dim=1), tensors[f"{case}.logits"]
    features, scale = tensors["image"][: expected.shape[1]], tensors["logit_scale"]
    ways = (True, False) if case == "test_single" else (False,)
    for alone in ways:
        scores = [scale * head.score(features, place, alone=alone, noise=(noise,)) for place, noise in enumerate(draws)]
        found = torch.cat(scores, dim=2)
        assert golden.max_error(found, expected) < FORWARD
        if "test.mean_logits" in tensors and case == "test":
            assert golden.max_error(found.mean(0), tensors["test.mean_logits"]) < FORWARD
    if case == "test_single":
        together = torch.cat(
            [
                scale * head.score(tensors["image"], place, alone=True, noise=(noise,))
                for place, noise in enumerate(draws)
            ],
            dim=2,
        )
        assert golden.max_error(together[:, :1], expected) < FORWARD


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_needs_no_draws(name: str, alone: bool) -> None:
    """Draws that cancel out have the scores of the mean as their mean."""
    head, tensors, meta, _ = build(name)
    for place, noise in enumerate(tensors["test.eps"].split(meta["task_sizes"], dim=1)):
        drawn = head.score(tensors["image"], place, alone=alone, noise=(torch.cat([noise, -noise]),))
        mean = head.score(tensors["image"], place, alone=alone)
        assert mean.shape == (1, len(tensors["image"]), meta["task_sizes"][place])
        torch.testing.assert_close(drawn.mean(0), mean[0], rtol=1e-5, atol=1e-5)

"""CLIPood's margin softmax and Beta moving average against the public code's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cl_kernels.nn import BetaWeights
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.clipood import margin_logits
from cl_methods.training.loop import train_on_batches

CASES = golden.names("clipood*")
AVERAGES = [(name, index) for name in CASES for index in range(len(golden.load(name)[1]["bma"]))]


@pytest.mark.parametrize("name", CASES)
def test_margin_softmax(name: str) -> None:
    tensors, meta = golden.load(name)
    expected = golden.under(tensors, "mms.")
    raw = expected["image_raw"].clone().requires_grad_()
    features = raw / raw.norm(dim=-1, keepdim=True)
    logits = margin_logits(features, expected["text"], expected["labels"], meta["lam"], meta["temperature"])
    loss = F.cross_entropy(logits, expected["labels"])
    loss.backward()
    assert golden.max_error(logits, expected["logits"]) < 1e-5
    assert golden.max_error(loss, expected["loss"]) < 2e-5
    assert golden.max_error(raw.grad, expected["grad_image_raw"]) < 2e-5


class Recorded(torch.optim.Optimizer):
    """Sets the one parameter to what it was after each step of the public code."""

    def __init__(self, parameter: nn.Parameter, snapshots: Any) -> None:
        super().__init__([parameter], {"lr": 0.0})
        self.parameter, self.snapshots = parameter, iter(snapshots)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.parameter.copy_(next(self.snapshots))


@pytest.mark.parametrize(("name", "index"), AVERAGES)
def test_beta_moving_average(name: str, index: int) -> None:
    """The method's own hooks around weights that take the recorded values end with the recorded average."""
    tensors, meta = golden.load(name)
    case, expected = meta["bma"][index], golden.under(tensors, f"bma{index}.")
    snapshots = expected["snapshots"]
    assert len(snapshots) == case["T"] + 1
    tower = nn.Module()
    tower.weight = nn.Parameter(snapshots[0].clone())
    width = snapshots[0].numel()
    backbone = SimpleNamespace(
        model=nn.Module(),
        device=torch.device("cpu"),
        logit_scale=torch.tensor(meta["temperature"]),
        tokenize=lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64),
        trim_texts=lambda tokens: tokens,
        encode_texts=lambda tokens, trimmed: F.one_hot(torch.arange(len(tokens)), width).float(),
        encode_images=lambda images: F.normalize(images.flatten(1)[:, :width] * tower.weight.flatten(), dim=1),
    )
    backbone.model.visual = tower
    config_type = METHODS["clipood"].Config
    method = METHODS["clipood"](
        backbone, config_type(beta=case["beta"], iterations=case["T"] - 1, margin=meta["lam"], weight_decay=0.0)
    )
    task = golden.task("class", golden.TokenTable(**{"class": torch.zeros(2, 1)}))
    method.before_task(0, task)
    batch = Batch(torch.ones(2, 3, width), torch.tensor([0, 1]), 0)
    optimizer = Recorded(tower.weight, snapshots[1:])
    train_on_batches(
        method,
        [batch] * case["T"],
        iterations=case["T"] - 1,
        warmup=0,
        lr=1.0,
        seed=0,
        task_index=0,
        optimizer=optimizer,
    )
    assert torch.equal(tower.weight.detach(), snapshots[-1])
    method.after_task(0, task)
    assert golden.max_error(tower.weight, expected["average"]) < 1e-5


@pytest.mark.parametrize(("name", "index"), AVERAGES)
def test_weights_of_the_snapshots(name: str, index: int) -> None:
    """Ours leave out the constant of the density; where the file holds them, the ratios agree."""
    tensors, meta = golden.load(name)
    case, expected = meta["bma"][index], golden.under(tensors, f"bma{index}.")
    weights = BetaWeights(case["beta"], case["T"] + 1)
    ours = torch.tensor([weights.weight(k) for k in range(case["T"] + 1)], dtype=torch.float64)
    x = (torch.arange(case["T"] + 1, dtype=torch.float64) + 0.5) / (case["T"] + 1)
    beta = torch.tensor(case["beta"], dtype=torch.float64)
    theirs = expected.get("weights", torch.distributions.Beta(beta, beta).log_prob(x).exp()).double()
    torch.testing.assert_close(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-5, atol=1e-8)

"""Texts are tokenised once, and what a prediction counts does not notice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_methods.commands.configuration import parse
from cl_methods.forecast.counting import count_work
from cl_methods.forecast.prediction import Predictor
from cl_methods.forecast.tokens import RememberedTokens
from cl_methods.scenarios.mini import tokenize
from cl_methods.training.building import select_scenario


def test_every_text_is_tokenised_once() -> None:
    asked: list[str] = []

    def plain(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return tokenize(texts)

    remembered = RememberedTokens(plain)
    first, second = ["a red star", "a blue ring", "a red star"], ["a green moon", "a blue ring"]
    for texts in (first, second, []):
        found, real = remembered(texts), tokenize(texts)
        assert torch.equal(found, real)
        assert found.dtype == real.dtype
    assert asked == ["a red star", "a blue ring", "a green moon"]


def test_a_prediction_counts_as_a_fresh_model_and_tokenizer_do() -> None:
    config, _ = parse(["--method", "moe_adapters", "--limit-tasks", "1"], "")
    scenario = select_scenario(config)
    predictor = Predictor(config, scenario)
    predictor.work(2)  # adapters go into the model that is counted, not into the one that is kept
    found, fresh = predictor.work(1), count_work(config, scenario, every_task=False)
    assert found.trainable == fresh.trainable > 0
    for one, other in zip(found.stages, fresh.stages, strict=True):
        assert (one.first, one.step, one.saved, one.steps) == (other.first, other.step, other.saved, other.steps)
    assert found.evaluation.flops == fresh.evaluation.flops
    assert found.between.images == fresh.between.images

"""Counts of trained parameters, against what the methods' definitions say for the tiny model."""

from __future__ import annotations

import pytest
from tiny_clip import build_model, tokenize, transform
from torch import Tensor

from cl_methods.cli import main
from cl_methods.methods import METHODS, parameter_counts
from cl_methods.methods.parameter_counts import trainable_parameters

WIDTH, BLOCKS = 32, 4  # of both towers together


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> int:
    """``untrained_open_clip`` gives the tiny model; its number of parameters."""

    def crop(image: Tensor) -> Tensor:
        return transform(image)[:, :16, :16]

    monkeypatch.setattr(parameter_counts, "untrained_open_clip", lambda name: (build_model(), tokenize, crop, crop))
    return sum(value.numel() for value in build_model().parameters())


def test_counts_follow_from_the_definitions(tiny: int) -> None:
    rows = {row.method: row for row in trainable_parameters("any", 10)}
    assert set(rows) == set(METHODS)
    assert {row.model for row in rows.values()} == {tiny}
    found = {name: row.trainable for name, row in rows.items()}
    assert found["zero_shot"] == found["ranpac"] == found["loranpac"] == 0
    assert found["finetune"] == found["zscl"] == found["ewc"] == tiny - 1
    config = METHODS["moe_adapters"].default_config("mtil")
    expert = 2 * WIDTH * config.bottleneck + WIDTH + config.bottleneck
    assert found["moe_adapters"] == BLOCKS * config.experts * (expert + 2 * WIDTH)


def test_the_command_prints_them_and_refuses_nonsense(tiny: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--count", "any", "--classes", "10"]) == 0
    printed = capsys.readouterr().out
    assert f"{tiny - 1:,}" in printed
    assert all(name in printed for name in METHODS)
    assert main(["methods", "--count", "any", "--classes", "0"]) == 2
    assert "classes: expected a number >= 1, got 0" in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--count", "ViT-Z"]) == 2
    assert "expected 'mini' or one of open_clip.list_models(), got 'ViT-Z'" in capsys.readouterr().err

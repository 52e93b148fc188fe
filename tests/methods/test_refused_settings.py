"""Settings that make no sense are refused with a sentence, before anything starts: in every method, one number after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images

from cl_methods.components.ddas import DDASConfig
from cl_methods.components.density_selector import DensityConfig
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS
from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.mulki_config import MulKIConfig
from cl_methods.methods.settings import build_settings

ANY_SIGN = {"weight_offset", "ridge_exponents"}
NUMBERS = (int, float)


def wrong_values(default: Any) -> Iterator[Any]:
    """For a setting with this default; none where its type alone decides."""
    if isinstance(default, dict):
        yield from ({"task": wrong} for wrong in (-1.0, 0.0, torch.nan, torch.inf))
    elif isinstance(default, tuple):
        yield from ((wrong,) * len(default) for wrong in (torch.nan, torch.inf))
    elif isinstance(default, NUMBERS) and not isinstance(default, bool):
        yield from (-1, torch.nan, torch.inf, -torch.inf)


def settings_of(config: type) -> Iterator[tuple[str, Any]]:
    """Names and defaults."""
    for entry in dataclasses.fields(config):
        if entry.default is not dataclasses.MISSING:
            yield entry.name, entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            yield entry.name, entry.default_factory()


@pytest.mark.parametrize("config", [*(method.Config for method in METHODS.values()), DDASConfig, DensityConfig])
def test_every_number_has_bounds(config: type) -> None:
    for name, default in settings_of(config):
        for wrong in wrong_values(default):
            if name in ANY_SIGN and wrong == -1:
                continue
            with pytest.raises(ValueError, match=name):
                build_settings(config, {name: wrong})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("zscl", {"distillation_weight": -1.0}, "distillation_weight: expected a number >= 0, got -1"),
        ("lwf", {"lr": torch.nan}, "lr: expected finite numbers, got nan"),
        ("finetune", {"task_lr": {"MNIST": torch.inf}}, "task_lr: expected finite numbers, got {'MNIST': inf}"),
        ("ranpac", {"held_out": 0.0}, "held_out: expected 0 < value < 1, got 0"),
        ("ranpac", {"ridge_exponents": (3, 2)}, r"from -37 to 37, got \(3, 2\)"),
        ("ranpac", {"ridge_exponents": (-8, 400)}, r"from -37 to 37, got \(-8, 400\)"),
        ("clap4clip", {"keep": "certain"}, "keep: 'certain' asks for an uncertainty, and selection is 'random'"),
        (
            "clap4clip",
            {"prior": "language_aware", "kl_weight": 0.0},
            "prior: 'language_aware' has no effect without the divergence from it",
        ),
        (
            "mulki",
            {"image_prototype_relation": False, "image_text_relation": False, "text_tower": "frozen"},
            "relation_weight: 0.03 of no relation; switch one on",
        ),
    ],
)
def test_what_makes_no_sense_is_said(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_settings(METHODS[name].Config, settings)


def test_what_makes_sense_is_not_refused() -> None:
    MulKIConfig(relation_weight=0.0, image_prototype_relation=False, image_text_relation=False, text_tower="frozen")
    ClapConfig(selection="entropy", keep="certain", prior="language_aware")


@pytest.mark.parametrize("name", ["replay", "icarl", "clap4clip", "proof"])
def test_a_memory_too_small_for_the_sequence_is_refused_before_its_first_task(name: str, tasks: list[Task]) -> None:
    method = METHODS[name](build_backbone(), METHODS[name].Config(memory=4))
    method.check_tasks(tasks[:1])
    with pytest.raises(
        ValueError, match="memory: expected at least one image for each of the 5 classes up to task task1"
    ):
        method.check_tasks(tasks)


def test_a_task_too_small_to_choose_a_ridge_is_refused_before_its_first_task(tasks: list[Task]) -> None:
    method = METHODS["ranpac"](build_backbone(), METHODS["ranpac"].Config(width=8))
    method.check_tasks(tasks)
    with pytest.raises(ValueError, match=r"held_out: 0\.2 of 1 images leaves 0"):
        method.check_tasks([tasks[0], replace(tasks[1], train=noise_images(1, 0, 1))])


def test_rates_of_misspelt_tasks(tasks: list[Task]) -> None:
    def check(**rates: float) -> None:
        METHODS["finetune"](build_backbone(), METHODS["finetune"].Config(task_lr=rates)).check_tasks(named)

    named = [replace(tasks[0], name="Aircraft"), replace(tasks[1], name="MNIST")]
    check(Aircraft=1e-3)
    check(EuroSAT=1e-3)  # of another sequence
    with pytest.raises(ValueError, match=r"task_lr: no task is called 'Aircrft'; did you mean Aircraft\?"):
        check(Aircrft=1e-3)


def test_a_rank_as_large_as_the_features_is_refused(reference: Reference) -> None:
    for features, width in (("statistics", 64), ("embedding", 16)):
        density = DensityConfig(features=features, density="low_rank", rank=width)
        config = METHODS["moe_adapters"].Config(detection="density", density=density)
        with pytest.raises(
            ValueError, match=f"rank: expected less than the width of the features, {width}, got {width}"
        ):
            METHODS["moe_adapters"](build_backbone(), config, reference)

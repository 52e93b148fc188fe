"""How many images an evaluation scores together: counted bytes are those of real passes, and what else decides."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
import torch

from cl_methods.backbone import load_backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.evaluation.options import USUAL_BATCH, EvaluationOptions
from cl_methods.methods import METHODS
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import select_scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.memory import evaluation_batch
from cl_methods.training.memory.evaluation_batch import LARGEST, _counted, _powers, choose_batch, fitting, pass_bytes
from cl_methods.training.memory.live import LiveMemory
from cl_methods.training.memory.plan import RESERVE, MemoryPlan
from cl_methods.training.planning.counting import blank_backbone
from cl_methods.training.run import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return select_scenario(RunConfig("zero_shot", METHODS["zero_shot"].default_config("mini"), limit_tasks=1))


def chosen(scenario: Scenario, device: torch.device = CPU, method: str = "zero_shot", **options: Any) -> int:
    settings, values = METHODS[method].default_config("mini"), options.pop("settings", {})
    asked = EvaluationOptions(batch_size=options.pop("asked", "auto"))
    config = RunConfig(method, dataclasses.replace(settings, **values), evaluation=asked)
    return choose_batch(config, scenario, find_method(method), device, **options).images


def plan_of(budget: int, images: int | None = None) -> MemoryPlan:
    """20 MiB are held, 5 of a step are not held between tasks."""
    mebibytes = [value << 20 for value in (4, 10, 3, 2, 1, 5)]
    parts = None if images is None else MicroBatches(images, frozen_images=4 * images)
    return MemoryPlan(budget, parts, *mebibytes, None)


@pytest.mark.parametrize(("images", "part"), [(3, None), (64, None), (20, 6)])
def test_counted_bytes_are_those_of_a_real_pass(images: int, part: int | None) -> None:
    """Operation by operation with data, weights aside; of many parts but for the features of the middle ones."""
    backbone = load_backbone("mini", None)
    side = backbone.eval_transform(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
    backbone.micro_batches = None if part is None else MicroBatches(frozen_images=part)
    with torch.no_grad(), LiveMemory() as memory:
        for value in (*backbone.model.parameters(), *backbone.model.buffers()):
            memory.leave_out(value)
        backbone.encode_images(torch.zeros(images, *side))
    counted = pass_bytes(blank_backbone("mini"), images, part)
    assert counted == memory.peak if part is None else counted == pytest.approx(memory.peak, rel=0.01)


def test_on_a_cpu_a_pass_stays_in_its_caches() -> None:
    """Few images of a large model, many of a small one."""
    found = {model: max(_powers(partial(_counted, model, None, None))) for model in ("mini", "ViT-B-32", "ViT-B-16")}
    assert found == {"mini": 128, "ViT-B-32": 16, "ViT-B-16": 4}


def test_the_largest_number_whose_counted_bytes_fit() -> None:
    needed = lambda count: 1000 + 30 * count  # noqa: E731
    for left in (1029, 1030, 1060, 2920, 2950, 40_000):
        found = fitting(needed, left)
        assert found == max(0, (left - 1000) // 30)
        assert needed(found + 1) > left


def test_memory_of_a_gpu_decides(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free, without the reserve, the weights and the copies of them to come."""
    model = blank_backbone("mini").model
    weights = evaluation_batch._COPIES * sum(value.numel() * value.element_size() for value in model.parameters())
    for kind in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(
            torch.cuda, kind, lambda device, kind=kind: 7 << 20 if kind.endswith("reserved") else 3 << 20
        )
    for images in (1, 70, 200, 10 * LARGEST):
        left = pass_bytes(blank_backbone("mini"), images)
        free = int((left + weights) / (1 - RESERVE)) + 8 - (4 << 20)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert chosen(scenario, torch.device("cuda")) == min(images, LARGEST)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    assert chosen(scenario, torch.device("cuda")) == 1


def test_a_budget_decides_on_a_cpu_too(scenario: Scenario) -> None:
    """Of what training leaves; images that go through in parts need the activations of one part."""
    whole = pass_bytes(blank_backbone("mini"), 40)
    budget = int(((20 << 20) + whole) / (1 - RESERVE)) + 8
    assert chosen(scenario, plan=plan_of(budget)) == 40
    assert 40 < chosen(scenario, plan=plan_of(budget, images=2)) <= USUAL_BATCH
    assert chosen(scenario, plan=plan_of(1 << 40)) == USUAL_BATCH


def test_what_else_decides(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(scenario) == 128
    assert chosen(scenario, asked=9) == 9
    assert chosen(scenario, earlier=24) == 24
    monkeypatch.setattr(evaluation_batch, "_CPU_CACHE", 1 << 20)
    assert chosen(scenario) == 8
    assert chosen(scenario, method="diki", settings={"scope": "batch"}) == USUAL_BATCH
    moe = METHODS["moe_adapters"].default_config("mini")
    ddas = dataclasses.replace(moe.ddas, scope="batch")
    assert chosen(scenario, method="moe_adapters") == 8
    assert chosen(scenario, method="moe_adapters", settings={"ddas": ddas}) == USUAL_BATCH
    monkeypatch.setattr(evaluation_batch.ranks, "joined_count", lambda: 50)
    monkeypatch.setattr(evaluation_batch, "_CPU_CACHE", 1 << 30)
    assert chosen(scenario) == len(scenario.tasks[0].test) // 200


@pytest.mark.parametrize("wrong", [0, -3, "many", 2.5])
def test_impossible_numbers(wrong: Any) -> None:
    with pytest.raises(ValueError, match="batch_size: expected a number of images >= 1, or auto, got"):
        EvaluationOptions(batch_size=wrong)


def test_a_run_that_goes_on_keeps_its_number(tmp_path) -> None:
    """``auto`` is decided once; the result says what it came to."""
    settings = METHODS["zero_shot"].default_config("mini")
    begun, later = (
        RunConfig(
            "zero_shot", settings, limit_tasks=1, device="cpu", evaluation=EvaluationOptions(batch_size=size, limit=30)
        )
        for size in (24, "auto")
    )
    run(begun, tmp_path)
    (tmp_path / "result.json").unlink()
    result = run(later, tmp_path, resume=True)
    assert result["config"]["evaluation"]["batch_size"] == 24
    assert later.evaluation.batch_size == "auto"
    fresh = run(later, tmp_path / "fresh")
    assert fresh["config"]["evaluation"]["batch_size"] == USUAL_BATCH
    assert json.loads((tmp_path / "fresh" / "run.json").read_text())["config"] == fresh["config"]

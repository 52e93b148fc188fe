"""The memory plan: sizes, counts of live bytes, rehearsals without data against real steps, choices, and what a run reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from shortened import shortened
from tiny_clip import build_backbone, noise_images
from torch._subclasses.fake_tensor import FakeTensor

from cl_methods.backbone import Precision
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.cli import main
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.memory.live import LiveMemory
from cl_methods.training.memory.planner import MemoryBudgetError, MemoryPlan, plan_memory
from cl_methods.training.memory.rehearsal import Rehearsal
from cl_methods.training.sizes import format_size, parse_size

KEPT = ("zscl", "mulki", "moe_adapters", "clap4clip")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("7.5 GB", 7_500_000_000),
        (" 900mib ", 900 << 20),
        ("4194304", 4 << 20),
        (".5KiB", 512),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8", "8 gigs", "-1GiB", "0MiB", "GiB", "1.2.3GB", "8GiB please"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"memory_budget: expected a size such as 8GiB, 7\.5GB or 900MiB, got"):
        parse_size(text)


def test_sizes_are_written() -> None:
    assert [format_size(n) for n in (300 << 20, 2.5 * 2**30, 512)] == ["300.0 MiB", "2.50 GiB", "0.5 KiB"]
    assert format_size((1 << 20) + 1, up=True) == "1.1 MiB"


def test_live_bytes_are_those_of_storages() -> None:
    with LiveMemory() as memory:
        first = torch.zeros(100)
        view = first[10:].view(9, 10)
        assert memory.bytes == 400
        second = first + 1
        assert (memory.bytes, memory.peak) == (800, 800)
        del first
        assert memory.bytes == 800
        del view
        assert (memory.bytes, memory.peak) == (400, 800)
        memory.peak = memory.bytes
        second.mul_(2)
        assert memory.peak == 400


def given() -> tuple[list[Task], Reference]:
    tasks = []
    for index, names in enumerate((("dog", "eel"), ("ant", "bee", "cat"))):
        images = [noise_images(24, 10 * index + part, len(names), 70 + 110 * index) for part in range(3)]
        tasks.append(Task(f"task{index}", names, ("a photo of {}", "{} again"), *images))
    return tasks, Reference(noise_images(20, 99, 1, 128), ("one thing", "two", "three things", "a fourth"))


def settings_of(name: str) -> Any:
    return dataclasses.replace(shortened(METHODS[name].default_config("mini")), batch_size=12)


def real_step(name: str, parts: MicroBatches | None, precision: Precision = "fp32") -> tuple[int, int]:
    """The most live bytes in the second step of the second task, and those alive before it, of tensors with data."""
    tasks, reference = given()
    memory, backbone = LiveMemory(), build_backbone()
    for value in (*backbone.model.parameters(), *backbone.model.buffers()):
        memory.count(value)
    backbone.micro_batches, backbone.precision = parts, precision
    with memory:
        method = METHODS[name](backbone, settings_of(name), reference)
        for index, task in enumerate(tasks):
            method.before_task(index, task)
            if not index:
                method.after_task(index, task)
                with torch.no_grad():  # learnt: the start of the next task is no copy of the pre-trained model
                    torch._foreach_mul_([value for _, value in method.trainable()], 1.01)
        method.stage = method.stages(tasks[1])[0]
        method.before_stage(method.stage)
        optimizer, source = method.optimizer(), method.training_images(tasks[1])
        others = method.reference_source(tasks[1]) if method.uses_reference else None
        for step in range(2):
            rows, shown, places = torch.arange(12) % len(source), None, None
            if others is not None:
                places = torch.arange(getattr(method.config, "reference_batch_size", 12)) % len(others)
                shown = torch.rand(len(places), 3, 16, 16)
            batch = Batch(torch.rand(12, 3, 16, 16), source.labels[rows], 0, shown, places, None, rows)
            memory.peak = memory.bytes
            before = memory.bytes - sum(one.nbytes for one in (batch.images, batch.reference_images) if one is not None)
            optimizer.zero_grad(set_to_none=True)
            terms = method.loss(batch)
            terms["loss"].backward()
            method.before_step(batch)
            optimizer.step()
            method.after_step(step)
            del terms
    return memory.peak, before


@pytest.mark.parametrize("name", KEPT)
def test_a_rehearsal_counts_what_a_real_step_needs(name: str) -> None:
    tasks, reference = given()
    rehearsal = Rehearsal(METHODS[name], settings_of(name), build_backbone(), tasks, reference, None)
    assert rehearsal.left_out is None
    peaks = []
    for parts in (None, MicroBatches(images=3, texts=2, frozen_images=4, frozen_texts=300)):
        peak, held = real_step(name, parts)
        peaks.append(rehearsal.step(parts))
        assert peaks[-1] == pytest.approx(peak, rel=0.03)
    fixed = rehearsal.model + rehearsal.carried + rehearsal.optimiser + rehearsal.gradients
    assert fixed == pytest.approx(held, rel=0.03)
    assert peaks[0] > fixed


def test_a_rehearsal_takes_one_iteration_of_a_fit_and_two_steps_of_the_optimiser() -> None:
    """Every way of cutting a batch is rehearsed, while somebody waits."""
    tasks, reference = given()
    settings = settings_of("moe_adapters")
    settings = dataclasses.replace(settings, ddas=dataclasses.replace(settings.ddas, iterations=10**9))
    rehearsal = Rehearsal(METHODS["moe_adapters"], settings, build_backbone(), tasks, reference, None)
    assert rehearsal.left_out is None
    assert all(isinstance(value, FakeTensor) for _, value in rehearsal.method.trainable())
    with mock.patch.object(rehearsal.optimizer, "step", wraps=rehearsal.optimizer.step) as update:
        peaks = {rehearsal.step(None) for _ in range(3)}
    assert update.call_count == 1  # the other one made the state
    assert len(peaks) == 1


def test_real_tensors_are_left_alone() -> None:
    backbone, (tasks, reference) = build_backbone(), given()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    Rehearsal(METHODS["finetune"], settings_of("finetune"), backbone, tasks, reference, None)
    assert torch.equal(torch.rand(2), expected)
    assert backbone.micro_batches is None
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


def test_the_fastest_plan_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """From all at once over parts to blocks, as the budget shrinks; below the smallest, a sentence with what would do."""
    monkeypatch.setattr("cl_methods.training.memory.planner._process_bytes", lambda backbone: 0)
    monkeypatch.setattr("cl_methods.training.memory.planner._SIZES", (8, 1))
    tasks, reference = given()
    settings = dataclasses.replace(settings_of("snd"), batch_size=48)

    def planned(budget: int) -> MemoryPlan:
        return plan_memory(METHODS["snd"], settings, build_backbone(), tasks, reference, budget)

    whole = planned(1 << 40)
    assert whole.micro_batches is None
    cut = planned(whole.peak)  # which would leave no reserve
    assert cut.micro_batches is not None
    assert cut.micro_batches.images == 8
    assert cut.peak < 0.92 * whole.peak
    with pytest.raises(
        MemoryBudgetError, match=r"snd on tiny does not fit into 10\.0 KiB.* even with one image at a time"
    ) as refused:
        planned(10 << 10)
    smallest = planned(parse_size(str(refused.value).rsplit("at least ", 1)[1]))
    assert smallest.micro_batches is not None
    assert smallest.micro_batches.images == 1
    assert smallest.peak < cut.peak
    assert smallest.as_dict()["peak"] == smallest.peak
    assert f"predicted peak memory of a training step: {format_size(smallest.peak)}" in smallest.lines()[0]


def test_a_run_follows_and_reports_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        "--method",
        "finetune",
        "--limit-tasks",
        "1",
        "--limit-iterations",
        "1",
        "--evaluation.limit",
        "20",
    ]
    assert main([*arguments, "--memory-budget", "64GiB", "--dry-run", "--output", str(tmp_path / "run")]) == 0
    assert "predicted peak memory of a training step" in capsys.readouterr().out
    assert main([*arguments, "--memory-budget", "64GiB", "--output", str(tmp_path / "run")]) == 0
    assert "measured peak memory" in "".join(capsys.readouterr())
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["train"]["memory"]
    assert memory["plan"]["budget"] == 64 << 30
    assert memory["plan"]["peak"] > 0
    assert memory["difference"] > -1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["memory_plan"] == memory["plan"]
    assert main([*arguments, "--memory-budget", "1MiB", "--output", str(tmp_path / "small")]) != 0
    assert "does not fit into 1.0 MiB" in capsys.readouterr().err
    assert not (tmp_path / "small" / "run.json").exists()

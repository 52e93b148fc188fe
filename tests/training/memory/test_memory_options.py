"""The plan with other levers than parts, for several processes, and of a run that goes on under another budget."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import given, real_step, settings_of
from tiny_clip import build_backbone

from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.cli import main
from cl_methods.components import weights
from cl_methods.components.expert_adamw import ExpertAdamW
from cl_methods.methods import METHODS
from cl_methods.scenarios import ScenarioOptions
from cl_methods.scenarios import load as load_scenario
from cl_methods.seeding import seed_everything
from cl_methods.training.config import RunConfig, differences
from cl_methods.training.loop import StepReport
from cl_methods.training.memory.levers import Levers, use_levers
from cl_methods.training.memory.optimizer_state import check_optimizer, state_bytes
from cl_methods.training.memory.planner import MemoryBudgetError, _Planner, plan_memory
from cl_methods.training.memory.rehearsal import Rehearsal
from cl_methods.training.progress import RunProgress
from cl_methods.training.run import Run, StoppedError, build_method
from cl_methods.training.sizes import format_size
from cl_methods.training.task import TaskTraining


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_methods.training.memory.eight_bit_optimizer._PIECE", 1 << 12)


@pytest.fixture
def without_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_methods.training.memory.planner._process_bytes", lambda backbone: 0)
    monkeypatch.setattr("cl_methods.training.memory.planner._SIZES", (1,))


def finetuning() -> _Planner:
    """Of a model most of whose weights are those of its text tower."""
    tasks, reference = given()
    backbone = build_backbone(width=256)
    rehearsal = Rehearsal(METHODS["finetune"], settings_of("finetune"), backbone, tasks, reference, None)
    return _Planner(rehearsal, backbone, 10 << 10)


def planner_of_a_gpu(**settings: Any) -> _Planner:
    """Figures of a GPU that is not here, for ZSCL, whose anchor comes in pieces of 1024 scalars."""
    tasks, reference = given()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights._BUCKET, "cuda", 1024)
        changed = dataclasses.replace(settings_of("zscl"), **settings)
        rehearsal = Rehearsal(METHODS["zscl"], changed, build_backbone(), tasks, reference, None)
    return _Planner(rehearsal, build_backbone(), 1, on_gpu=True)


@pytest.fixture(scope="module")
def on_a_gpu() -> _Planner:
    return planner_of_a_gpu()


def test_a_rehearsal_in_16_bits_counts_what_a_real_step_needs() -> None:
    tasks, reference = given()
    rehearsal = Rehearsal(METHODS["zscl"], settings_of("zscl"), build_backbone(), tasks, reference, None)
    parts = MicroBatches(images=3, texts=2, frozen_images=4, frozen_texts=300)
    peak, _ = real_step("zscl", parts, "bf16")
    assert rehearsal.step(parts, "bf16") == pytest.approx(peak, rel=0.03)
    assert rehearsal.step(None, "bf16") < rehearsal.step(None)


@pytest.mark.usefixtures("without_process", "small_pieces")
def test_a_refusal_says_which_lever_would_help() -> None:
    """Below what parts alone can do, the sentence has a lever and its figure; with that lever the plan fits."""
    planner = finetuning()
    assert planner.proposal(Levers()) == ""  # nothing helps
    planner.budget = int(0.99 * planner.smallest(Levers()).peak / 0.92)
    coded = Levers(optimizer_state="8bit")
    smallest = planner.smallest(coded)
    expected = f"it would fit with --optimizer-state 8bit ({format_size(smallest.peak)})"
    assert expected in planner.proposal(Levers())
    assert planner.fits(smallest)
    assert "with --optimizer-state 8bit" in smallest.lines()
    assert smallest.as_dict()["levers"]["optimizer_state"] == "8bit"
    assert "8bit" not in planner.proposal(coded)  # which is used already
    tasks, reference = given()
    with pytest.raises(MemoryBudgetError, match=re.escape(expected) + r".*; expected a budget of at least"):
        plan_memory(
            METHODS["finetune"], settings_of("finetune"), build_backbone(width=256), tasks, reference, planner.budget
        )


def test_levers_together_where_none_helps_alone(on_a_gpu: _Planner) -> None:
    """On a GPU, where averages, anchors and optimiser state on the host are three levers: all are named, with one figure."""
    planner = on_a_gpu
    plain, averages, anchors, host, all_three = (
        planner.smallest(Levers(**change)).peak
        for change in (
            {},
            {"offload": "averages"},
            {"offload": "anchors"},
            {"optimizer_state": "host"},
            {"offload": "all", "optimizer_state": "host"},
        )
    )
    assert all_three < host < averages < anchors < plain  # the anchor is as large as the averages, and needs slots
    planner.budget = int((all_three + host) / 2 / 0.92)
    found = planner.proposal(Levers())
    assert found.startswith("it would fit with --"), found
    assert "--optimizer-state host --offload all" in found
    planner.budget = int((plain + anchors) / 2 / 0.92)
    found = planner.proposal(Levers())
    assert f"it would fit with --offload averages ({format_size(averages)}), or with --offload anchors" in found
    assert f"--offload anchors ({format_size(anchors)}), or with --optimizer-state host ({format_size(host)})" in found
    # What is used already is not offered again, but together with the other.
    together = planner.smallest(Levers(offload="all")).peak
    for used in ("averages", "anchors"):
        assert f"--offload all ({format_size(together)})" in planner.proposal(Levers(offload=used))  # type: ignore[arg-type]
        assert f"--offload {used}" not in planner.proposal(Levers(offload=used))  # type: ignore[arg-type]
    assert "--offload" not in planner.proposal(Levers(offload="all"))


def test_what_saves_nothing_is_not_offered(on_a_gpu: _Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model the slots are larger than the anchor; where the previous model teaches, the anchor is no copy."""
    monkeypatch.setattr(on_a_gpu.rehearsal, "staging", 2 * on_a_gpu.rehearsal.anchors)
    monkeypatch.setattr(on_a_gpu, "budget", 1 << 40)
    assert "--offload averages" in on_a_gpu.proposal(Levers())
    assert "anchors" not in on_a_gpu.proposal(Levers())
    shared = planner_of_a_gpu(teacher="previous").rehearsal
    assert (shared.anchors, shared.staging) == (0, 0)
    assert shared.averages == on_a_gpu.rehearsal.averages


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("none", "averages", "averages"),
        ("averages", "averages", "averages"),
        ("averages", "anchors", "all"),
        ("anchors", "averages", "all"),
        ("all", "anchors", "all"),
        ("anchors", "none", "anchors"),
    ],
)
def test_what_lies_on_the_host_adds_up(first: Any, second: Any, both: str) -> None:
    found = Levers(offload=first).with_all([Levers(offload=second), Levers(optimizer_state="host")])
    assert found == Levers(offload=both, optimizer_state="host")  # type: ignore[arg-type]
    offers = [one.offload for one in Levers(offload=first).others(host_apart=True, adamw=True) if one.offload != first]
    assert offers == {"none": ["averages", "anchors"], "averages": ["all"], "anchors": ["all"], "all": []}[first]
    assert all(one.offload == first for one in Levers(offload=first).others(host_apart=False, adamw=True))


def test_what_lies_on_the_host_counts_on_a_gpu_alone(on_a_gpu: _Planner) -> None:
    """There the plan of the same step, less the averages, the anchors, the optimiser's state; on a CPU nothing changes."""
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"offload": "averages"},
        {"optimizer_state": "host"},
        {"offload": "anchors"},
        {"offload": "all"},
    )
    rehearsal = on_a_gpu.rehearsal
    plain, averages, host, anchors, both = (on_a_gpu.plan(None, Levers(**one)) for one in changes)
    one_copy = sum(value.numel() * 4 for _, value in rehearsal.method.trainable())
    assert rehearsal.averages == plain.carried - averages.carried == one_copy
    assert rehearsal.anchors == one_copy
    assert rehearsal.staging == 2 * 4 * 1024
    assert plain.peak - anchors.peak == plain.carried - anchors.carried == one_copy - rehearsal.staging
    assert plain.peak - both.peak == 2 * one_copy - rehearsal.staging
    assert (plain.optimiser, host.optimiser) == (rehearsal.optimiser, 0)
    assert plain.peak - averages.peak == one_copy
    assert plain.peak - host.peak == rehearsal.optimiser
    on_a_gpu.host_apart = False
    assert len({on_a_gpu.plan(None, Levers(**one)).peak for one in changes}) == 1
    # While a GPU computes on a batch, the next one is copied there.
    config = settings_of("zscl")
    pixels = (config.batch_size + config.reference_batch_size) * 3 * 16 * 16 * 4
    assert plain.peak - on_a_gpu.plan(None, Levers()).peak == pixels + 8 * config.batch_size
    on_a_gpu.host_apart = True


def test_what_a_method_builds_in_a_rehearsal_goes_to_the_device(on_a_gpu: _Planner) -> None:
    """Detectors and heads are built on the host and sent to the GPU, where their inputs are; without data there, too."""
    rehearsal = on_a_gpu.rehearsal
    before = rehearsal.memory.bytes
    with rehearsal._rehearsing():
        built = torch.nn.BatchNorm1d(5000)
        assert built.to(rehearsal.method.backbone.device).weight.device.type == "cpu"
        sent = built.to("cuda:1")
    assert sent is built
    assert {value.device for value in sent.parameters()} == {torch.device("cuda:1")}
    assert sent.running_mean.device == torch.device("cuda:1")
    assert rehearsal.memory.bytes - before == 4 * 4 * 5000 + 8  # and the number of batches, which stays a number


@pytest.mark.usefixtures("without_process", "small_pieces")
def test_8_bit_state_is_in_the_plan() -> None:
    planner = finetuning()
    fp32, coded = planner.plan(None, Levers()), planner.plan(None, Levers(optimizer_state="8bit"))
    sizes = [value.numel() for _, value in planner.rehearsal.method.trainable()]
    assert fp32.optimiser == state_bytes(sizes, "fp32")
    assert coded.optimiser == state_bytes(sizes, "8bit") < 0.5 * fp32.optimiser
    assert (fp32.model, fp32.carried, fp32.gradients) == (coded.model, coded.carried, coded.gradients)
    with pytest.raises(ValueError, match="optimizer_state: 8bit is for AdamW, this method's optimiser is ExpertAdamW"):
        check_optimizer(ExpertAdamW([torch.nn.Parameter(torch.zeros(2))], {}, lr=0.1), "8bit")


def test_the_plan_of_several_processes_is_that_of_one_share() -> None:
    """Two of them hold the same and encode half a batch each; gradients under way come on top, not what is gathered."""
    tasks, reference = given()
    settings = dataclasses.replace(settings_of("finetune"), batch_size=128)
    one, two = (
        Rehearsal(METHODS["finetune"], settings, build_backbone(), tasks, reference, None, processes)
        for processes in (1, 2)
    )
    held = [found.model + found.carried + found.optimiser + found.gradients for found in (one, two)]
    assert held[0] == held[1]
    needed = [found.step(None) - held[0] for found in (one, two)]
    assert two.gradients < needed[1]
    assert 0.45 * needed[0] < needed[1] < 0.7 * needed[0]


@pytest.mark.parametrize("method", ["moe_adapters", "diki", "mulki"])
def test_a_process_is_planned_that_reads_no_image_between_tasks(method: str) -> None:
    """Detectors, statistics and prototypes are learnt batch by batch, and a rehearsal has fewer batches than processes."""
    tasks, reference = given()
    settings = settings_of(method)
    one, many = (
        Rehearsal(METHODS[method], settings, build_backbone(), tasks, reference, None, processes)
        for processes in (1, 8)
    )
    assert (one.model, one.gradients, one.optimiser) == (many.model, many.gradients, many.optimiser)
    assert many.step(None) - many.gradients < one.step(None)


def test_settings_of_earlier_runs_and_where_things_lie_do_not_hinder_resuming() -> None:
    now = RunConfig("finetune", METHODS["finetune"].default_config("mini")).as_dict()
    earlier = {key: value for key, value in now.items() if key not in ("precision", "optimizer_state", "offload")}
    assert differences(earlier, now) == []
    for offload in ("averages", "anchors", "all"):
        assert differences(now, {**now, "optimizer_state": "host", "offload": offload, "memory_budget": "8GiB"}) == []
    assert differences(now, {**now, "precision": "bf16"}) == ["precision was fp32, now bf16"]
    assert differences(now, {**now, "optimizer_state": "8bit"}) == ["optimizer_state was fp32, now 8bit"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("precision", "fp16", r"precision: expected one of fp32, bf16, got 'fp16'"),
        ("optimizer_state", "4bit", r"optimizer_state: expected one of fp32, 8bit, host, got '4bit'"),
        ("offload", "teachers", r"offload: expected one of none, averages, anchors, all, got 'teachers'"),
    ],
)
def test_other_values_are_refused(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig("finetune", METHODS["finetune"].default_config("mini"), **{option: value})


def test_8_bits_without_the_package_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_methods.training.memory.optimizer_state.find_spec", lambda name: None)
    assert main(["run", "--method", "finetune", "--optimizer-state", "8bit", "--output", str(tmp_path / "run")]) != 0
    assert "the package torchao, which is not installed" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


class Stopping(RunProgress):
    """Asks the run to stop after so many steps; keeps the losses."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.after, self.losses, self.run = after, [], None

    def step(self, report: StepReport) -> None:
        super().step(report)
        self.losses.append(report.log.values()["loss"])
        if len(self.losses) == self.after:
            assert self.run is not None
            self.run.stop()


@pytest.mark.usefixtures("without_process")
def test_a_run_goes_on_under_another_budget(tmp_path: Path) -> None:
    """Stopped in its task under a large budget, continued in parts under a small one: the losses of a run that was not."""
    settings = dataclasses.replace(METHODS["finetune"].default_config("mini"), batch_size=16)
    config = RunConfig("finetune", settings, limit_tasks=1, limit_iterations=2, device="cpu")
    config.evaluation.limit = 6
    config.checkpoint.every = 1

    def execute(folder: str, budget: str | None, after: int | None = None) -> Stopping:
        progress = Stopping(after)
        given = dataclasses.replace(config, memory_budget=budget)
        progress.run = Run(given, tmp_path / folder, resume=True, overwrite=False, progress=progress)
        progress.run.execute()
        return progress

    whole = execute("whole", None)
    with pytest.raises(StoppedError):
        execute("cut", "64GiB", after=1)
    large = json.loads((tmp_path / "cut" / "run.json").read_text())["memory_plan"]
    assert large["micro_batches"] is None
    rest = execute("cut", f"{int(large['peak'] * 0.9)}")
    assert rest.run is not None
    assert rest.run.memory_plan is not None
    assert rest.run.memory_plan.micro_batches is not None
    assert len(rest.losses) == 2
    assert rest.losses == pytest.approx(whole.losses[1:], rel=1e-5)
    results = [json.loads((tmp_path / folder / "result.json").read_text()) for folder in ("whole", "cut")]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[1]["train"]["memory"]["plan"]["micro_batches"]["images"] == rest.run.memory_plan.micro_batches.images


@pytest.mark.torchao
def test_losses_with_levers_stay_close_to_those_of_fp32() -> None:
    """Ten steps on a task of `mini`: with 8-bit moments, and with towers in 16 bits, losses within 2 % of fp32's, and they fall."""
    settings = dataclasses.replace(METHODS["finetune"].default_config("mini"), batch_size=16)
    config = RunConfig("finetune", settings, limit_iterations=9, limit_tasks=1, device="cpu")
    scenario = load_scenario("mini", ScenarioOptions(), order="I")
    curves: dict[Levers, list[float]] = {}
    for levers in (Levers(), Levers(optimizer_state="8bit"), Levers(precision="bf16")):
        method = build_method(config, scenario, torch.device("cpu"))
        use_levers(method, levers)
        curve = curves[levers] = []
        seed_everything(0)
        TaskTraining(
            method,
            0,
            scenario.tasks[:1],
            optimizer_state=levers.optimizer_state,
            on_step=lambda report, curve=curve: curve.append(report.log.values()["loss"]),
        ).execute()
    plain, *others = curves.values()
    assert sum(plain[-3:]) < sum(plain[:3])
    for curve in others:
        assert curve == pytest.approx(plain, rel=0.02)
        assert curve != plain

"""The plan of a run: FLOPs without data are those of a real step, bytes those of a real checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cl_kernels as clk
from cl_methods.datasets.images import Subset
from cl_methods.datasets.task import Reference
from cl_methods.evaluation.options import EvaluationOptions
from cl_methods.methods import METHODS, Batch, Method
from cl_methods.methods.finetune import FineTune
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import build_method, select_scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.data import TrainingSteps, training_batches
from cl_methods.training.planning import counting
from cl_methods.training.planning.counting import blank_backbone, count_run
from cl_methods.training.planning.plan import make_plan, readable_flops
from cl_methods.training.planning.time_bound import product_speed, readable_duration
from cl_methods.training.run import run


def config(name: str, **changes: Any) -> RunConfig:
    values = {"limit_tasks": 1, "limit_iterations": 1, "device": "cpu", **changes}
    return RunConfig(name, METHODS[name].default_config("mini"), **values)


def gradient_flops(method: Method, batch: Batch) -> int:
    """FLOPs of a batch's loss and gradients, with the kernels' definitions and attention as the products that it is."""
    with (
        clk.use_backend("reference"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        method.loss(batch)["loss"].backward()
        method.before_step(batch)
    return int(counter.get_total_flops())


def real_step(settings: RunConfig) -> int:
    """FLOPs of the first step of a run."""
    scenario = select_scenario(settings)
    method, task = build_method(settings, scenario, torch.device("cpu")), scenario.tasks[0]
    method.before_task(0, task)
    stage = method.stages(task)[0]
    method.stage = stage
    method.before_stage(stage)
    steps = TrainingSteps.of_stage(method, scenario.tasks, 0, stage, seed=0)
    batch = next(training_batches(steps, start_step=0, iterations=1, device=torch.device("cpu")))
    return gradient_flops(method, batch)


@pytest.mark.parametrize("name", ["finetune", "zscl", "moe_adapters", "diki", "proof", "clap4clip"])
def test_a_step_without_data_counts_what_a_real_one_does(name: str) -> None:
    settings = config(name)
    costs = count_run(settings, select_scenario(settings))
    assert costs.uncounted is None
    assert costs.stages[0].first == real_step(settings)
    assert costs.stages[0].steps == 2


def real_tasks(settings: RunConfig, scenario: Scenario) -> list[int]:
    """FLOPs of all steps of every task of a run."""
    method = build_method(settings, scenario, torch.device("cpu"))
    found = []
    for index, task in enumerate(scenario.tasks):
        method.before_task(index, task)
        (stage,) = method.stages(task)
        method.stage = stage
        method.before_stage(stage)
        optimizer = method.optimizer()
        steps = TrainingSteps.of_stage(method, scenario.tasks, index, stage, seed=settings.seed)
        total = 0
        for batch in training_batches(steps, start_step=0, iterations=stage.iterations, device=torch.device("cpu")):
            optimizer.zero_grad(set_to_none=True)
            total += gradient_flops(method, batch)
            optimizer.step()
            method.after_step(batch.step)
        method.after_task(index, task)
        found.append(total)
    return found


@pytest.mark.parametrize("name", ["zscl", "snd", pytest.param("lwf", marks=pytest.mark.slow)])
def test_teachers_encode_what_no_task_or_only_earlier_ones_have_shown(name: str) -> None:
    """Two steps of 4 among 11 reference images in each of two tasks: some of the second task's have been met in the first.

    ZSCL's teacher stays, SnD has one that stays and one of each task, and LwF's is of each task, with the task's own images.
    """
    default = METHODS[name].default_config("mini")
    changes = {"reference_batch_size": 4} if hasattr(default, "reference_batch_size") else {}
    small = dataclasses.replace(default, batch_size=4, **changes)
    settings = RunConfig(name, small, limit_tasks=2, limit_iterations=1, device="cpu")
    scenario = select_scenario(settings)
    assert scenario.reference is not None
    few = Reference(Subset(scenario.reference.images, torch.arange(11)), scenario.reference.captions[:4])
    tasks = tuple(dataclasses.replace(task, train=Subset(task.train, torch.arange(6))) for task in scenario.tasks)
    scenario = dataclasses.replace(scenario, tasks=tasks, reference=few)
    stages = count_run(settings, scenario).stages
    assert [stage.flops for stage in stages] == real_tasks(settings, scenario)
    met = [(stage.new_images, stage.old_images) for stage in stages]
    if name != "lwf":
        assert met[0] == (8, 0)
        assert met[1][0] == 3
        assert met[1][1] == 5


def test_a_plan_says_what_a_run_writes_and_encodes(tmp_path: Path) -> None:
    settings = config("finetune", limit_tasks=2, evaluation=EvaluationOptions(limit=10))
    plan = make_plan(settings, select_scenario(settings))
    result = run(settings, tmp_path / "run")
    files = [path.stat().st_size for path in tmp_path.glob("run/checkpoints/*/model.safetensors")]
    assert len(files) == 2
    assert sum(files) == pytest.approx(plan.checkpoints[0], rel=0.02)  # names and shapes in the header
    assert plan.costs.trainable == result["train"]["trainable_parameters"]
    assert plan.images_encoded == (3 * 20, 3 * 20)
    assert [(task.evaluated, task.available, task.steps) for task in plan.tasks] == [(10, 1000, 2)] * 2
    assert plan.training_flops == sum(task.flops for task in plan.tasks)
    assert plan.sentences()[0].startswith("evaluation: 3 rows of 20 images (limited); 60 image encodings")


def test_a_method_that_needs_data_is_planned_without_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(FineTune):
        name = "looks"

        def loss(self, batch):
            raise ValueError("the images are too dark\nreally")

    monkeypatch.setattr(counting, "find_method", lambda name: Looks)
    settings = config("finetune")
    plan = make_plan(settings, select_scenario(settings))
    assert plan.training_flops is None
    assert "training: FLOPs not counted; a step needs data (ValueError: the images are too dark)" in plan.sentences()
    assert plan.evaluation_flops[0] > 0


def test_flops_of_a_real_model_and_their_words() -> None:
    """Published: 35.1 GFLOP for an image of ViT-B/16; no weights are needed."""
    backbone = blank_backbone("ViT-B-16-quickgelu")
    with FlopCounterMode(display=False) as counter:
        backbone.encode_images(torch.empty(1, 3, 224, 224, device="meta"))
    assert readable_flops(counter.get_total_flops()) == "35.1 GFLOP"
    assert [readable_flops(value) for value in (0, 999, 1e6, 2.5e18)] == [
        "0 FLOP",
        "999 FLOP",
        "1 MFLOP",
        "2.5e+03 PFLOP",
    ]


def test_the_time_of_a_plan_is_its_operations_at_the_speed_of_the_device() -> None:
    settings = config("finetune", limit_tasks=2)
    plan = make_plan(settings, select_scenario(settings))
    speed = (plan.training_flops + plan.evaluation_flops[0]) / 9000
    assert "time: at least 2.5 h for training and evaluation" in plan.time_sentence(speed, "cpu")
    assert product_speed(torch.device("cpu")) > 1e6
    assert [readable_duration(value) for value in (0.2, 40, 300, 9000, 250000)] == [
        "less than a second",
        "40 s",
        "5 min",
        "2.5 h",
        "2.9 days",
    ]


def test_a_run_that_only_measures_plans_no_step() -> None:
    settings = config("finetune", evaluation=EvaluationOptions(only=True))
    plan = make_plan(settings, select_scenario(settings))
    assert (plan.rows, plan.training_flops, [task.steps for task in plan.tasks]) == (1, 0, [0])

"""Counts without data are those of real steps; several processes divide what they say and exchange what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_kernels.profile.static import comparable_attention
from cl_methods import ranks
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.commands.configuration import parse
from cl_methods.forecast.counting import RunWork, count_work
from cl_methods.forecast.sizes import scenario_without_files
from cl_methods.forecast.work import Work, WorkCount
from cl_methods.methods import METHODS
from cl_methods.ranks.simulated import simulated
from cl_methods.training.building import build_method, select_scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.data import TrainingSteps, training_batches
from cl_methods.training.planning.counting import count_run


def configured(method: str, **changes: object) -> RunConfig:
    settings = replace(METHODS[method].default_config("mini"), **changes)
    return RunConfig(method, settings, limit_tasks=1, device="cpu")


def real_step(config: RunConfig) -> WorkCount:
    """The second step of a run on real tensors, counted."""
    scenario = select_scenario(config)
    method, task = build_method(config, scenario, torch.device("cpu")), scenario.tasks[0]
    method.before_task(0, task)
    stage = method.stages(task)[0]
    method.stage = stage
    method.before_stage(stage)
    steps = TrainingSteps.of_stage(method, scenario.tasks, 0, stage, seed=0)
    optimizer = method.optimizer()
    for batch in training_batches(steps, start_step=0, iterations=1, device=torch.device("cpu")):
        with comparable_attention(), WorkCount(method.backbone.model.parameters()) as count:
            optimizer.zero_grad(set_to_none=True)
            method.loss(batch)["loss"].backward()
            method.before_step(batch)
            optimizer.step()
            method.after_step(batch.step)
    return count


@pytest.mark.parametrize("method", ["zscl", "moe_adapters", "mulki", "clap4clip"])
def test_a_counted_step_is_a_real_one(method: str) -> None:
    """FLOPs exactly; bytes and operations but for what looks at values, or at how many samples an expert had."""
    config = configured(method)
    counted = count_work(config, select_scenario(config), lists=False).stages[0].first
    real = real_step(config).work
    assert counted.flops == real.flops
    assert counted.bytes == pytest.approx(real.bytes, rel=0.05)
    assert counted.operations == pytest.approx(real.operations, rel=0.06)


@pytest.fixture(scope="module")
def zscl() -> dict[int, RunWork]:
    """Shares of 10 images and 6 reference images."""
    config = configured("zscl", batch_size=10, reference_batch_size=6)
    return {count: count_work(config, select_scenario(config), count) for count in (1, 2, 4)}


def test_processes_share_the_images_and_exchange_pixels_features_and_gradients(zscl: dict[int, RunWork]) -> None:
    steps = {count: work.stages[0].step for count, work in zscl.items()}
    assert [step.images for step in steps.values()] == [16, 8, 3 + 2]
    assert steps[1].exchanged == 0
    pixels, feature, trained = 3 * 32 * 32 * 4, 96 * 4, 4 * zscl[1].trainable
    for count, step in steps.items():
        if count > 1:
            share = [-(-rows // count) * count for rows in (10, 6, 16)]  # padded to the largest share
            assert sum(step.summed.elements()) == trained
            for size in (share[0] * pixels, share[1] * pixels, share[2] * feature):
                assert step.gathered[size] == 1
    assert steps[1].flops / 4 < steps[4].flops < steps[2].flops < steps[1].flops


def test_evaluation_is_shared_but_for_the_class_texts(zscl: dict[int, RunWork]) -> None:
    works = {count: work.evaluation for count, work in zscl.items()}
    texts = 2 * works[2].flops - works[1].flops  # images/N + texts
    assert 0 < texts < works[1].flops
    assert works[4].flops == pytest.approx((works[1].flops - texts) / 4 + texts)
    assert works[1].images == 2 * 1000  # the zero-shot row and one more
    assert works[4].images == 500


def test_parts_cost_one_more_forward_pass_and_save_memory() -> None:
    config = configured("finetune", batch_size=8)
    whole, parts = (
        count_work(config, select_scenario(config), parts=cut).stages[0]
        for cut in (None, MicroBatches(images=2, texts=4))
    )
    assert 1.2 * whole.step.flops < parts.step.flops < 1.4 * whole.step.flops  # forward : backward is 1 : 2
    assert parts.saved < whole.saved


def test_between_tasks_images_are_encoded_as_often_as_the_method_says() -> None:
    config = replace(configured("mulki"), limit_tasks=2)
    scenario = select_scenario(config)
    first, second = (len(task.train) for task in scenario.tasks)
    one, four = (count_work(config, scenario, count).between for count in (1, 4))
    assert one.images == first + 2 * second  # one teacher, then two
    assert four.images == one.images / 4


def test_tasks_that_are_not_counted_lie_between_those_that_are() -> None:
    """FLOPs within 1 %: attention alone is not linear in the texts."""
    config = replace(configured("zscl"), limit_tasks=5)
    scenario = select_scenario(config)
    every, some = (count_work(config, scenario, every_task=flag) for flag in (True, False))
    assert [(stage.task, stage.steps, stage.new_steps) for stage in some.stages] == [
        (stage.task, stage.steps, stage.new_steps) for stage in every.stages
    ]
    for one, other in zip(some.stages, every.stages, strict=True):
        assert one.step.flops == pytest.approx(other.step.flops, rel=0.01)
    assert some.evaluation.flops == every.evaluation.flops
    assert some.between.images == every.between.images


@pytest.mark.parametrize("method", [pytest.param("zscl", marks=pytest.mark.slow), "snd"])
def test_teachers_meet_new_images_in_every_task_as_the_plan_of_a_run_has_them(method: str) -> None:
    """ZSCL's teacher stays, one of SnD's two does not: what it meets again is new to it."""
    config = replace(configured(method, batch_size=4, reference_batch_size=4), limit_tasks=2)
    scenario = select_scenario(config)
    first, second = count_work(config, scenario).stages
    planned = count_run(config, scenario).stages
    assert [stage.total.flops for stage in (first, second)] == pytest.approx(
        [stage.flops for stage in planned], rel=0.005
    )
    assert (first.new_steps, first.again_steps) == (first.steps, 0)
    assert second.new_steps + second.again_steps == second.steps
    assert 0 < second.new_steps < second.steps
    teacher, forgetful = (stage.first.flops - stage.step.flops for stage in (first, second))
    assert teacher > 0
    assert (forgetful, second.again.flops - second.step.flops) == (
        (teacher, 0) if method == "zscl" else (2 * teacher, teacher)
    )


def test_the_stand_in_leaves_nothing_behind() -> None:
    with simulated(3) as noted:
        assert (ranks.count(), ranks.rank(), list(ranks.share(10))) == (3, 2, [6, 7, 8, 9])
        assert ranks.gather_rows(torch.zeros(4, 2), 10).shape == (10, 2)
        config = configured("finetune")
        with pytest.raises(RuntimeError, match="counted by one process alone"):
            count_work(config, select_scenario(config))
    assert noted.gathered == {3 * 4 * 2 * 4: 1}
    assert ranks.count() == 1
    with pytest.raises(ValueError, match="processes: expected a number >= 1, got 0"), simulated(0):
        pass


def test_tasks_of_mtil_have_the_published_sizes_without_files() -> None:
    config, _ = parse(["--scenario", "mtil", "--method", "zscl"], "")
    scenario = scenario_without_files(config, captions=7, reference_images=9)
    assert sum(len(task.class_names) for task in scenario.tasks) == 1201
    assert sum(len(task.test) for task in scenario.tasks) == 97_209
    assert scenario.reference is not None
    assert (len(scenario.reference.captions), len(scenario.reference.images)) == (7, 9)
    few, _ = parse(["--scenario", "mtil", "--method", "zscl", "--data.shots", "5", "--limit-tasks", "2"], "")
    assert [len(task.train) for task in scenario_without_files(few).tasks] == [500, 505]
    with pytest.raises(ValueError, match="captions: expected a number >= 1, got 0"):
        scenario_without_files(config, captions=0)


def test_what_needs_data_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: object, batch: object) -> dict[str, torch.Tensor]:
        raise RuntimeError("the images are too dark\nreally")

    monkeypatch.setattr(METHODS["finetune"], "loss", loss)
    config = configured("finetune")
    with pytest.raises(
        ValueError, match=r"finetune: a step cannot be counted without data \(the images are too dark\)"
    ):
        count_work(config, select_scenario(config))


def test_nothing_is_exchanged_by_one(zscl: dict[int, RunWork]) -> None:
    assert zscl[1].stages[0].total.exchanged == 0
    assert isinstance(zscl[1].between, Work)

"""What a run is made of: its scenario, its method over a backbone, and how many rows it fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cl_methods import ranks
from cl_methods.backbone import load_backbone
from cl_methods.evaluation.novelty import check_novelty
from cl_methods.methods import METHODS, Method
from cl_methods.methods.find import find_method
from cl_methods.scenarios import load as load_scenario
from cl_methods.scenarios.base import Scenario
from cl_methods.seeding import derive_seed, seed_everything
from cl_methods.sharding import shard
from cl_methods.training.config import RunConfig
from cl_methods.training.memory.evaluation_batch import choose_batch, with_batch

if TYPE_CHECKING:
    from cl_methods.training.memory.plan import MemoryPlan


def select_scenario(config: RunConfig) -> Scenario:
    """The configured scenario, cut to its first ``limit_tasks`` tasks.

    Raises:
        DataError: its data is missing or damaged.
    """
    scenario = load_scenario(config.scenario, config.data, order=config.order)
    if config.limit_tasks is None:
        return scenario
    return replace(scenario, tasks=scenario.tasks[: config.limit_tasks])


def build_method(config: RunConfig, scenario: Scenario, device: torch.device) -> Method:
    """The configured method over its backbone, built with seeded random numbers.

    Raises:
        ValueError: the method needs reference data and the scenario has none, its settings do not go with the tasks, or the model
            cannot be loaded.
    """
    seed_everything(derive_seed(config.seed, "build"))
    backbone = load_backbone(config.model, config.pretrained, device=device)
    method = find_method(config.method)(backbone, config.effective_settings(), scenario.reference)
    if config.learns(method):
        method.check_tasks(scenario.tasks)
    check_novelty(method, config.evaluation, len(scenario.tasks))
    return method


def check_distributed(config: RunConfig) -> None:
    """Refuse to shard the weights of a method that works on whole ones.

    Raises:
        ValueError: the method is one.
    """
    if config.distributed == "fsdp" and not find_method(config.method).shards:
        able = [name for name in METHODS if METHODS[name].shards]
        raise ValueError(
            f"distributed: {config.method} needs whole weights in every process, got fsdp; expected replicated, or one of the "
            f"methods whose weights can be sharded: {', '.join(able)}"
        )


def shard_backbone(config: RunConfig, method: Method, note: Callable[[str], None]) -> None:
    """Shard the method's weights over the processes of the run, if it is configured to."""
    if config.distributed != "fsdp":
        return
    if ranks.count() == 1:
        note("distributed: fsdp over one process shards nothing; start several with torchrun (docs/distributed.md)")
    shard(method.backbone)


def plan_run_memory(
    config: RunConfig, scenario: Scenario, device: torch.device, note: Callable[[str], None]
) -> MemoryPlan | None:
    """The plan for the configured memory budget and levers, told to ``note``; None without either, or where nothing is planned.

    Of several processes the first one plans for all.

    Raises:
        MemoryBudgetError: nothing fits.
        ValueError: a lever does not go with the method.
    """
    if not config.plans_memory:
        return None
    from cl_methods.training.memory.planner import give_back_freed_memory, plan_run  # which take a second to load

    if device.type == "cpu" and config.memory_budget is not None:
        give_back_freed_memory()
    plan = ranks.from_first(lambda: plan_run(config, scenario, device))
    for line in plan.lines() if plan is not None else ["memory: no plan, the method takes no optimiser steps"]:
        note(line)
    return plan


def decide_batch(
    config: RunConfig,
    scenario: Scenario,
    method: Method,
    note: Callable[[str], None],
    *,
    plan: MemoryPlan | None = None,
    earlier: int | None = None,
) -> RunConfig:
    """The configuration with the number of images that evaluations score together in place of `auto`.

    Several processes take the smallest of what each found.

    Args:
        config, scenario, method: of the run; the method is on its device.
        note: told the number where memory decided it.
        plan: its memory plan, if there is one.
        earlier: the number that a run which goes on began with.
    """
    chosen = choose_batch(config, scenario, type(method), method.backbone.device, plan=plan, earlier=earlier)
    if chosen.by_memory:
        note(chosen.sentence)
    return with_batch(config, min(ranks.gather_values(chosen.images)))


def rows_after_learning(config: RunConfig, method: Method | type[Method], tasks: int) -> int:
    """Rows of accuracies besides the zero-shot one.

    A method that learns nothing keeps that row, except in class-incremental runs, where more classes compete after every task.
    """
    if config.learns(method):
        return 1 if method.joint else tasks
    return tasks if config.scenario == "cil" and "seen" in config.evaluation.label_spaces else 0


def check_frozen_images(method: Method) -> None:
    """Features of a tower that trains must not be taken for frozen ones.

    Raises:
        ValueError: the method says that evaluation images keep their features, and trains the image tower.
    """
    visual = getattr(method.backbone.model, "visual", None)
    if method.frozen_images and visual is not None:
        tower = {id(value) for value in visual.parameters()}
        trained = [name for name, value in method.trainable() if id(value) in tower]
        if trained:
            raise ValueError(
                f"frozen_images: {method.name} says that evaluation images keep their features, but it trains {trained[0]}; "
                "leave frozen_images False"
            )

"""What a process of several needs, rehearsed in one without the others, against what each of them holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks_memory import backbone_of, parts_of, settings_for
from test_memory import given

from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.methods import METHODS
from cl_methods.ranks.pretended import PretendedGroup
from cl_methods.training.memory.levers import Levers
from cl_methods.training.memory.planner import _Planner
from cl_methods.training.memory.rehearsal import Rehearsal

PROGRAM = Path(__file__).with_name("ranks_memory.py")


def rehearsal_of(name: str, count: int, distributed: str, *, gloo: bool = True) -> Rehearsal:
    """With gloo, as the processes have it: what it reduces is a tensor that the processes see too, what it gathers is not."""
    (tasks, reference), sharded = given(), distributed == "fsdp"
    settings, backbone = settings_for(name), backbone_of()
    return Rehearsal(METHODS[name], settings, backbone, tasks, reference, None, count, sharded=sharded, gloo=gloo)


@pytest.mark.parametrize(
    ("name", "count", "distributed"),
    [
        ("zscl", 2, "fsdp"),
        ("zscl", 2, "replicated"),
        pytest.param("mulki", 3, "replicated", marks=pytest.mark.slow),
        pytest.param("lwf", 3, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_rehearsal_counts_what_each_process_holds(name: str, count: int, distributed: str, forked_clk) -> None:
    """At once and in parts: the most of any process, and every process about as much."""
    done = forked_clk.run(PROGRAM, count, name, distributed, "0,4", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    every = json.loads(done.stdout)
    assert len(every) == count
    rehearsal = rehearsal_of(name, count, distributed)
    assert rehearsal.left_out is None
    held = rehearsal.model + rehearsal.carried + rehearsal.optimiser + rehearsal.gradients
    predicted = [*(rehearsal.step(parts_of(size, distributed)) for size in (0, 4)), held]
    for found in every:
        assert found == pytest.approx(predicted, rel=0.03)


def test_a_share_of_sharded_weights_what_is_whole_between_steps_and_the_parts_that_are_tried() -> None:
    """Weights, gradients and moments halve but for padding, and an evaluation needs all weights; blocks alone run again."""
    whole, half = (rehearsal_of("finetune", 2, distributed, gloo=False) for distributed in ("replicated", "fsdp"))
    for kind in ("model", "gradients", "optimiser"):
        assert getattr(half, kind) == pytest.approx(getattr(whole, kind) / 2, rel=0.02), kind
    assert whole.outside(None) == 0
    assert half.outside(None) >= half.outside(MicroBatches(frozen_images=1)) > half.gradients + 3 * half.model
    planner = _Planner(half, backbone_of(), None)
    ways = list(planner.ways())
    assert [(parts.images, parts.blocks) for parts in ways] == [(size, True) for size in (32, 16, 8, 4, 2, 1)]
    everything, cut = planner.plan(None, Levers()), planner.plan(ways[-1], Levers())
    assert everything.lines()[0].startswith(
        "predicted peak memory of a training step in each of 2 processes, weights sharded"
    )
    assert cut.step < everything.step


def test_a_group_that_is_not_there_leaves_no_trace() -> None:
    assert not dist.is_initialized()
    group = PretendedGroup(3)
    assert not dist.is_initialized()
    world = dist.distributed_c10d._world
    known, named = len(world.pg_map), world.group_count
    with group.as_default():
        assert (dist.get_world_size(), dist.get_rank()) == (3, 0)
        assert dist.new_group().size() == 3
    assert not dist.is_initialized()
    assert (len(world.pg_map), world.group_count) == (
        known + 1,
        named,
    )  # the other processes count only their own groups
    del group
    assert len(world.pg_map) == known - 1
    with pytest.raises(ValueError, match="processes: expected a number >= 2, got 1"):
        PretendedGroup(1)

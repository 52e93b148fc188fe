"""MoE-Adapters: what a task changes and what it leaves alone, routing at test, states in the middle of a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, transform
from torch import Tensor
from trained import DETECTOR, Batches, train

from cl_methods.components.ddas import DDASConfig
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import MoEAdapters, ZeroShot
from cl_methods.methods.moe_adapters_config import MoEAdaptersConfig

SHORT: dict[str, Any] = {"lr": 2e-2, "iterations": 3, "warmup": 1, "experts": 5, "bottleneck": 8, "ddas": DETECTOR}
CIL: dict[str, Any] = {"experts": 2, "routers": "shared", "detection": "none", "freeze": 0}


def build(reference: Reference | None, **settings: Any) -> MoEAdapters:
    torch.manual_seed(0)
    return MoEAdapters(build_backbone(), MoEAdaptersConfig(**{**SHORT, **settings}), reference)


def learn(method: MoEAdapters, index: int, tasks: list[Task], batches: Batches) -> None:
    method.before_task(index, tasks[index])
    train(method, batches(index, 4))
    torch.manual_seed(5)
    method.after_task(index, tasks[index])


def copies(method: MoEAdapters) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def shown(task: Task) -> Tensor:
    return torch.stack([transform(task.test.image(index)) for index in range(len(task.test))])


def test_a_task_changes_its_router_and_active_experts_only(
    tasks: list[Task], reference: Reference, batches: Batches
) -> None:
    method = build(reference)
    clip = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    learn(method, 0, tasks, batches)
    before = copies(method)
    method.before_task(1, tasks[1])
    train(method, batches(1, 4))
    after = copies(method)
    for name, value in method.backbone.model.state_dict().items():
        assert torch.equal(value, clip[name]), name
    for place, block in method.adapters.blocks.items():
        prefix = f"adapters.blocks.{place}."
        assert torch.equal(after[prefix + "routers.0"], before[prefix + "routers.0"])
        assert not torch.equal(after[prefix + "routers.1"], torch.zeros_like(after[prefix + "routers.1"]))
        assert block.frozen.sum() == 2
        still = block.frozen | (block.usage == 0)
        for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
            moved = (after[prefix + name] != before[prefix + name]).flatten(1).any(dim=1)
            assert not moved[still].any(), (place, name)
            assert moved[~still].all() or name == "down_bias", (place, name)


def test_counts_restart_and_the_most_used_are_frozen(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference)
    learn(method, 0, tasks, batches)
    for place, block in method.adapters.blocks.items():
        rows = 4 * (6 if place.startswith("visual") else len(tasks[0].class_names)) * method.config.top_k
        assert int(block.usage.sum()) == rows
        assert set(block.frozen.nonzero().flatten().tolist()) == set(block.usage.topk(2).indices.tolist())
    method.before_task(1, tasks[1])
    assert all(not block.usage.any() for block in method.adapters.each())


def test_frozen_experts_may_be_chosen_again(tasks: list[Task], reference: Reference) -> None:
    method = build(reference)
    method.before_task(0, tasks[0])
    block = next(method.adapters.each())
    block.usage.copy_(torch.tensor([5, 9, 1, 0, 3]))
    assert block.freeze_most_used(2).tolist() == [1, 0]
    block.usage.copy_(torch.tensor([5, 0, 1, 0, 3]))
    assert block.freeze_most_used(2).tolist() == [0, 4]
    assert block.frozen.tolist() == [True, True, False, False, True]


def test_noise_and_dropout_only_in_training(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    method = build(reference)
    learn(method, 0, tasks, batches)
    images = shown(tasks[0])
    assert torch.equal(method.logits(images, tasks[0]), method.logits(images, tasks[0]))
    method.before_task(1, tasks[1])
    batch = batches(1, 1)[0]
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(method.loss(batch)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_images_go_to_the_router_of_their_task(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    """Before any task: plain CLIP. Later each image by itself, whatever shares its batch."""
    method = build(reference)
    plain = method.logits(shown(tasks[0]), tasks[0])
    zero_shot = ZeroShot(build_backbone(), ZeroShot.Config())
    assert torch.equal(plain, zero_shot.logits(shown(tasks[0]), tasks[0]))
    for index in range(2):
        learn(method, index, tasks, batches)
    method.before_evaluation()
    for index, task in enumerate(tasks):
        assert (method.detector.decide(shown(task)) == index).float().mean() > 0.9
    together = torch.cat([shown(tasks[0])[:3], shown(tasks[1])[:5]])
    chosen = method.detector.decide(together)
    assert len(chosen.unique()) > 1
    scores = method.logits(together, tasks[1])
    for row, image in enumerate(together):
        torch.testing.assert_close(method.logits(image[None], tasks[1])[0], scores[row], rtol=1e-4, atol=1e-5)


def test_class_incremental_form(tasks: list[Task], batches: Batches) -> None:
    """One router, both experts always active, nothing frozen, no detector."""
    method = build(None, **CIL)
    before = method.logits(shown(tasks[0]), tasks[0])
    for index in range(2):
        learn(method, index, tasks, batches)
    assert method.detector is None
    for block in method.adapters.each():
        assert len(block.routers) == 1
        assert not block.frozen.any()
        assert len(set(block.usage.tolist())) == 1
    assert not torch.equal(method.logits(shown(tasks[0]), tasks[0]), before)
    resumed = build(None, **CIL)
    resumed.load_state_dict(copies(method))
    assert torch.equal(resumed.logits(shown(tasks[0]), tasks[0]), method.logits(shown(tasks[0]), tasks[0]))


def test_a_state_in_the_middle_of_a_task_is_complete(tasks: list[Task], reference: Reference, batches: Batches) -> None:
    ends = []
    for resumed in (False, True):
        method = build(reference)
        learn(method, 0, tasks, batches)
        between = copies(method)
        method.before_task(1, tasks[1])
        steps = batches(1, 4)
        optimizer = train(method, steps[:2])
        if resumed:
            middle, moments = copies(method), optimizer.state_dict()
            method = build(reference)
            method.load_state_dict(between)
            method.before_task(1, tasks[1])
            method.load_state_dict(middle)
            optimizer = method.optimizer()
            optimizer.load_state_dict(moments)
        train(method, steps[2:], 2, optimizer)
        torch.manual_seed(5)
        method.after_task(1, tasks[1])
        ends.append((copies(method), method.logits(shown(tasks[1]), tasks[1])))
    assert ends[0][0].keys() == ends[1][0].keys()
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name
    assert torch.equal(ends[0][1], ends[1][1])


def test_without_reference_the_threshold_protects(tasks: list[Task], batches: Batches) -> None:
    method = build(None, ddas=replace(DETECTOR, threshold=2.0))
    with pytest.warns(UserWarning, match="no reference images"):
        learn(method, 0, tasks, batches)
    assert method.detector.generic is None
    assert (method.detector.decide(shown(tasks[1])) == -1).all()


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="top_k: expected 1 to experts = 2, got 3"):
        MoEAdaptersConfig(experts=2, top_k=3)
    with pytest.raises(ValueError, match="detection: 'none' leaves open"):
        MoEAdaptersConfig(detection="none")
    with pytest.raises(ValueError, match="detection: a shared router needs no detector"):
        MoEAdaptersConfig(routers="shared")
    with pytest.raises(FileNotFoundError, match="alexnet_weights: expected the path"):
        build(None, ddas=DDASConfig())
    with pytest.raises(RuntimeError, match=r"'model\.x' is no tensor of moe_adapters"):
        build(None, ddas=DETECTOR).load_state_dict({"model.x": torch.zeros(1)})

"""Images of a step go through the student once, whichever they are, with the loss and gradients of several passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from shortened import TRAINED, shortened
from tiny_clip import build_backbone
from torch import Tensor

from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.task import TaskTraining

TWO_BATCHES = ("zscl", "lwf", "lwf_vr", "snd", "replay", "icarl")


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_passes_each_tower_once(name: str, tasks: list[Task], reference: Reference) -> None:
    """Where gradients are recorded; teachers and frozen towers have none."""
    method = METHODS[name](build_backbone(), shortened(METHODS[name].default_config("mini")), reference)
    passes: Counter[str] = Counter()

    def count(tower: str) -> Any:
        return lambda *_: passes.update({tower: int(bool(inside) and torch.is_grad_enabled())})

    model, inside, loss = method.backbone.model, [], method.loss
    model.visual.register_forward_pre_hook(count("images"))
    model.transformer.register_forward_pre_hook(count("texts"))

    def watched(batch: Batch) -> dict[str, Tensor]:
        inside.append(batch)
        passes.clear()
        terms = loss(batch)
        assert passes["images"] <= 1
        assert passes["texts"] <= (2 if name == "zscl" else 1)  # the captions of its text tower's own distillation
        seen.append((batch.reference_images is not None, passes["images"]))
        inside.clear()
        return terms

    seen: list[tuple[bool, int]] = []
    method.loss = watched  # type: ignore[method-assign]
    for index in [0] if method.joint else range(2):
        TaskTraining(method, index, tasks).execute()
    if name in TWO_BATCHES:
        assert (True, 1) in seen


@pytest.mark.parametrize("name", ["zscl", "snd"])
def test_one_pass_is_as_good_as_two(
    name: str, tasks: list[Task], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = []
        for passes in (1, 2):
            torch.manual_seed(0)
            backbone = build_backbone()
            backbone.model.double()
            backbone.train_transform = backbone.eval_transform = lambda image: image.double() / 127.5 - 1
            method = METHODS[name](backbone, shortened(METHODS[name].default_config("mini")), reference)
            encode, step = backbone.encode_images, []
            if passes == 2:
                monkeypatch.setattr(
                    backbone,
                    "encode_images",
                    lambda images, encode=encode: torch.cat([encode(part) for part in images.split(3)]),
                )
            before_step = method.before_step

            def watched(batch: Batch, method: Any = method, step: list[Any] = step, hook: Any = before_step) -> None:
                step.append({one: value.grad.clone() for one, value in method.trainable() if value.grad is not None})
                hook(batch)

            method.before_step = watched  # type: ignore[method-assign]
            TaskTraining(method, 0, tasks).execute()
            found.append(step)
        assert len(found[0]) == len(found[1]) > 0
        for one, other in zip(found[0][0].items(), found[1][0].items(), strict=True):
            assert one[0] == other[0]
            torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)

"""Mounting adapters: exact bypass, removal, no host synchronisation in a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cl_kernels as clk
from cl_methods.backbone import Backbone
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.ddas import DDASConfig
from cl_methods.datasets.task import Task
from cl_methods.methods import Batch, MoEAdapters
from cl_methods.methods.moe_adapters_config import MoEAdaptersConfig

SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal"}


def randomise(adapters: MountedAdapters) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for value in adapters.parameters():
            value.normal_(std=0.3)


def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_bypass_is_exact_and_removal_complete(backbone: Backbone) -> None:
    texts = backbone.tokenize(["ant", "bee"])
    names = list(backbone.model.state_dict())
    before = backbone.encode_images(images()), backbone.encode_texts(texts)
    adapters = MountedAdapters(backbone, experts=3)
    for block in adapters.each():
        block.add_routers(1)
    randomise(adapters)
    assert list(backbone.model.state_dict()) == names
    assert torch.equal(backbone.encode_images(images()), before[0])
    with adapters.active(0):
        changed = backbone.encode_images(images()), backbone.encode_texts(texts)
        with adapters.active(None):
            assert torch.equal(backbone.encode_texts(texts), before[1])
    for ours, theirs in zip(changed, before, strict=True):
        assert (ours - theirs).abs().max() > 1e-3
    adapters.remove()
    with adapters.active(0):
        assert torch.equal(backbone.encode_images(images()), before[0])
    MountedAdapters(backbone, experts=2)


def test_fresh_adapters_change_nothing(backbone: Backbone) -> None:
    before = backbone.encode_images(images())
    adapters = MountedAdapters(backbone, experts=3)
    for block in adapters.each():
        block.add_routers(1)
    with adapters.active(0):
        torch.testing.assert_close(backbone.encode_images(images()), before)


def test_one_tower_can_stay_bare(backbone: Backbone) -> None:
    assert set(MountedAdapters(backbone, experts=2, text=False).blocks) == {"visual_0", "visual_1"}


def test_mounting_is_checked(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="top_k: expected 1 to experts = 2, got 3"):
        MountedAdapters(backbone, experts=2, top_k=3)
    MountedAdapters(backbone, experts=2)
    with pytest.raises(ValueError, match="block 0 of the visual tower already carries adapters"):
        MountedAdapters(backbone, experts=2)
    backbone.model.visual.transformer = torch.nn.Identity()
    with pytest.raises(TypeError, match="visual tower of tiny has no open_clip residual blocks"):
        MountedAdapters(backbone, experts=2)


class OperatorNames(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def dense_mixture(
    x: Tensor, expert_ids: Tensor, gates: Tensor, *weights: Tensor, scale: float, dropout_p: float, residual: Tensor
) -> Tensor:
    """Every expert on every sample: slow, and free of the data-dependent shapes that a plain reference may use."""
    down, down_bias, up, up_bias = weights
    hidden = F.dropout(F.relu(torch.einsum("bld,erd->belr", x, down) + down_bias[:, None]), dropout_p)
    out = torch.einsum("belr,edr->beld", hidden, up) + up_bias[:, None]
    dense = torch.zeros(len(x), len(down)).scatter(1, expert_ids, gates)
    return residual + scale * torch.einsum("be,beld->bld", dense, out)


def dense_routed(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, *weights: Tensor, k: int, noise: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    gates, expert_ids, usage = clk.top_k_gating(x[:, 0], w_gate, w_noise, k=k, noise=noise)
    assert options.pop("add_input")
    return x + dense_mixture(x, expert_ids, gates, *weights, **options), usage


def test_a_step_never_waits_for_the_device(
    backbone: Backbone, tasks: list[Task], batches: Callable[..., list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, counting, masks and the optimiser use no operator that reads a value on the host.

    The adapter operation itself, which on a CPU may be the plain reference, is replaced; kernels are tested on their own.
    """
    monkeypatch.setattr("cl_kernels.nn.routed_adapter", dense_routed)
    monkeypatch.setattr("cl_methods.components.expert_adamw._readable", lambda value: False)  # as on a GPU
    config = MoEAdaptersConfig(experts=4, bottleneck=8, ddas=DDASConfig(features="backbone"))
    method = MoEAdapters(backbone, config)
    method.before_task(0, tasks[0])
    optimizer = method.optimizer()
    with OperatorNames() as operators:
        for batch in batches(0, 2):
            optimizer.zero_grad(set_to_none=True)
            method.loss(batch)["loss"].backward()
            method.before_step(batch)
            optimizer.step()
            method.after_step(batch.step)
    assert "aten::native_layer_norm" in operators.names
    assert not operators.names & SYNCHRONISING

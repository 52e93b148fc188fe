"""MoE-Adapters4CL and mammoth blocks, patched and unpatched: outputs, gradients, optimiser steps, counts, bytes, operations."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import cil_task
import mtil_task
import pytest
import torch
from moe_structures import RANK, WIDTH, CilBlock, MtilBlock, Towers
from torch import Tensor, nn
from torch.nn import functional as F

from cl_kernels import drop_in
from cl_kernels.profile import OperationCount

VARIANTS: dict[str, tuple[Callable[[], Towers], Callable[[nn.Module], drop_in.Patch]]] = {
    "mtil": (lambda: Towers(MtilBlock, 22), drop_in.patch_moe_adapters4cl),
    "mtil, one router": (lambda: Towers(MtilBlock, 6, 3, task_id=-1), drop_in.patch_moe_adapters4cl),
    "cil": (lambda: Towers(CilBlock, 2), drop_in.patch_moe_adapters4cl),
    "mammoth": (lambda: Towers(CilBlock, 5), drop_in.patch_mammoth_moe_adapters),
}
BLOCKS = ["visual.0", "visual.1", "transformer.0", "transformer.1"]
COUNTS = ("choose_map_image", "choose_map_text")


@pytest.fixture(params=VARIANTS)
def pair(request) -> tuple[Towers, Towers, drop_in.Patch]:
    """A model, a patched copy, and the patch."""
    torch.manual_seed(0)
    make, apply = VARIANTS[request.param]
    model = make()
    twin = copy.deepcopy(model)
    return model, twin, apply(twin)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(n, length, WIDTH, generator=generator) for n, length in ((9, 5), (4, 7)))
    return images, texts, torch.arange(9) % 4


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    images, texts, labels = batch(seed)
    torch.manual_seed(seed)
    return F.cross_entropy(model(images, texts), labels)


def counts(model: nn.Module) -> list[Tensor]:
    return [getattr(m, name) for m in model.modules() for name in COUNTS if hasattr(m, name)]


def assert_same_step(model: nn.Module, twin: nn.Module, seed: int) -> None:
    values, states = [], []
    for m in (model, twin):
        m.zero_grad()
        value = loss(m, seed)
        states.append(torch.get_rng_state())
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(values[1], values[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(*states), "another number of random numbers was drawn"
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"{name}: an optimiser would treat it differently"
        if p.grad is not None:
            torch.testing.assert_close(
                q.grad, p.grad, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_gradients(pair, mode):
    model, twin, patch = pair
    assert patch.replaced == BLOCKS
    getattr(model, mode)()
    getattr(twin, mode)()
    with torch.no_grad():
        expected, found = (m(*batch()[:2]) for m in (model, twin) if torch.manual_seed(1))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert_same_step(model, twin, 0)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, eps=1e-5),
    ],
    ids=["SGD", "AdamW"],
)
def test_ten_steps_with_frozen_experts(pair, optimiser):
    model, twin, _ = pair
    optimisers = []
    for m in (model, twin):
        for name, p in m.named_parameters():
            if "adaptmlp_list.1." in name:
                p.requires_grad_(False)
        optimisers.append(optimiser([p for p in m.parameters() if p.requires_grad]))
    start = copy.deepcopy(model.state_dict())
    for step in range(10):
        assert_same_step(model, twin, step)
        for o in optimisers:
            o.step()
    moved = 0.0
    for (name, expected), found in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        moved = max(moved, float((expected - start[name]).abs().max()))
        assert "adaptmlp_list.1." not in name or torch.equal(expected, start[name])
    assert moved > 1e-3
    assert counts(model), "nothing was counted"
    for expected, found in zip(counts(model), counts(twin), strict=True):
        assert torch.equal(expected, found)


def test_clean_gates_of_an_untrained_router_choose_the_same_experts():
    """All logits are equal, and ``torch.topk`` decides."""
    model = Towers(MtilBlock, 22)
    for block in [*model.visual, *model.transformer]:
        block.is_train = False
        nn.init.zeros_(block.router_list[1])
    twin = copy.deepcopy(model).eval()
    drop_in.patch_moe_adapters4cl(twin)
    assert_same_step(model.eval(), twin, 0)
    for expected, found in zip(counts(model), counts(twin), strict=True):
        assert expected.sum() > 0
        assert torch.equal(expected, found)


def test_the_active_task_is_followed(monkeypatch):
    model = Towers(MtilBlock, 4)
    twin = copy.deepcopy(model)
    drop_in.patch_moe_adapters4cl(twin)
    seen = []
    for task in (None, 0, 2, -1):
        monkeypatch.setattr(mtil_task, "val_task_id", task)
        if task != -1:  # the plain model, which is frozen
            assert_same_step(model, twin, 0)
        expected, found = loss(model).item(), loss(twin).item()
        assert found == pytest.approx(expected, abs=1e-6)
        seen.append(round(found, 4))
    assert len(set(seen)) == 4
    model = Towers(CilBlock, 2)
    twin = copy.deepcopy(model)
    drop_in.patch_mammoth_moe_adapters(twin)
    monkeypatch.setattr(cil_task, "global_taskid", None)
    with OperationCount() as count, torch.no_grad():
        torch.testing.assert_close(loss(twin), loss(model))
    assert not any("moe_adapter" in name for name in count.by_name)


def test_dropout_has_the_same_distribution():
    torch.manual_seed(0)
    model = Towers(CilBlock, 2, dropout=0.5)
    twin = copy.deepcopy(model)
    drop_in.patch_moe_adapters4cl(twin)
    x = batch()[0].permute(1, 0, 2)
    for m in (model, twin):
        m.visual[0].is_train = False
    with torch.no_grad():
        means, spreads = [], []
        for m in (model, twin):
            outputs = torch.stack([m.visual[0](x) for _ in range(400)])
            means.append(outputs.mean(0))
            spreads.append(outputs.std(0))
        assert spreads[0].min() > 0
        error = (spreads[0] ** 2 + spreads[1] ** 2).div(400).sqrt()
        assert ((means[0] - means[1]).abs() / error).mean() < 1.2  # 0.8 expected
        torch.testing.assert_close(spreads[1].mean(), spreads[0].mean(), rtol=0.02, atol=0)
        torch.testing.assert_close(model.eval().visual[0](x), twin.eval().visual[0](x))


def test_undo_restores_every_byte_and_every_attribute(pair):
    model, twin, patch = pair
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in twin.named_parameters()}
    names = [(type(a), set(vars(a))) for a in model.modules()]
    assert [set(vars(b)) - {"_pending"} for b in twin.modules()] == [n for _, n in names]
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [n for n, _ in twin.named_buffers()] == [n for n, _ in model.named_buffers()]
    with patch:
        loss(twin).backward()
    assert [(type(b), set(vars(b))) for b in twin.modules()] == names
    for name, p in twin.named_parameters():
        assert p is before[name][0]
        assert p.data_ptr() == before[name][1]
        assert torch.equal(p, before[name][2])
    patch.undo()
    assert_same_step(model, twin, 3)
    assert "undone" in str(patch)


def test_copies_are_patched_and_files_are_not(pair, tmp_path):
    model, twin, patch = pair
    duplicate = copy.deepcopy(twin)
    with torch.no_grad():
        for p in duplicate.parameters():
            p.mul_(1.01)
        expected, found = loss(model), loss(duplicate)
    assert abs(expected - found) > 1e-4, "the copy has served the weights of the original"
    assert isinstance(duplicate.visual[0], type(model.visual[0]))
    torch.save(twin, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(read.visual[0]) is type(model.visual[0])
    assert "_pending" not in vars(read.visual[0])
    assert b"cl_kernels" not in pickle.dumps(twin)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    assert b"cl_kernels" not in file.getvalue()
    assert repr(twin) == repr(model)
    patch.undo()


def test_replicas_use_their_own_weights():
    """What DataParallel does to a module, on this machine's one device."""
    model = Towers(CilBlock, 2)
    drop_in.patch_moe_adapters4cl(model)
    block = model.visual[0]
    replica = block._replicate_for_data_parallel()
    assert type(replica) is type(block)
    assert replica.forward.__self__ is replica


def test_an_expert_in_another_mode_runs_as_published():
    model = Towers(CilBlock, 2, dropout=0.5)
    drop_in.patch_moe_adapters4cl(model)
    model.train()
    model.visual[0].adaptmlp_list[0].eval()
    with OperationCount() as count, torch.no_grad():
        model.visual[0](batch()[0].permute(1, 0, 2))
    assert not any("moe_adapter" in name for name in count.by_name)


@pytest.mark.native
@pytest.mark.parametrize(("block", "experts", "fewer"), [(MtilBlock, 22, 100), (CilBlock, 2, 20)])
def test_operations_of_the_adapters(block, experts, fewer):
    """Forward and backward pass of a block, less those of the block without adapters."""
    torch.manual_seed(0)
    x = torch.randn(64, 5, WIDTH).permute(1, 0, 2).requires_grad_()

    def operations(block: nn.Module) -> int:
        block.zero_grad()
        with OperationCount() as count:
            block(x).sum().backward()
        return count.operations

    model = Towers(block, experts, dropout=0.1)
    plain = Towers(MtilBlock, 2, adapter_flag=False).visual[0]
    published = operations(model.visual[0]) - operations(plain)
    drop_in.patch_moe_adapters4cl(model)
    ours = operations(model.visual[0]) - operations(plain)
    assert published >= fewer * ours, (published, ours)


def test_refusals():
    with pytest.raises(ValueError, match=r"patch_moe_adapters4cl: found nothing to replace, expected .*adaptmlp_list"):
        drop_in.patch_moe_adapters4cl(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got dict"):
        drop_in.patch_mammoth_moe_adapters({})
    model = Towers(MtilBlock, 4)
    first = drop_in.patch_moe_adapters4cl(model.visual)
    second = drop_in.patch_moe_adapters4cl(model)
    assert first.replaced == ["0", "1"]
    assert second.replaced == BLOCKS[2:]
    assert second.left == dict.fromkeys(BLOCKS[:2], "already patched")
    with pytest.raises(ValueError, match=r"visual.0: already patched"):
        drop_in.patch_moe_adapters4cl(model)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: setattr(b.adaptmlp_list[1], "non_linear_func", nn.GELU()), "another activation than ReLU"),
        (lambda b: setattr(b.adaptmlp_list[1], "scale", 0.2), "differ in shape, scale or dropout"),
        (lambda b: setattr(b.adaptmlp_list[1], "scale", nn.Parameter(torch.ones(1))), "not a fixed number"),
        (lambda b: setattr(b.adaptmlp_list[1], "up_proj", nn.Linear(RANK, WIDTH, bias=False)), "with bias"),
        (lambda b: setattr(b.adaptmlp_list[1], "adapter_layer_norm_before", nn.LayerNorm(WIDTH)), "a LayerNorm"),
        (lambda b: b.adaptmlp_list[1].register_forward_hook(lambda *_: None), "hooks"),
        (lambda b: (delattr(b, "router_list"), delattr(b, "w_noise_list")), "no mixture"),
        (lambda b: setattr(b, "__class__", Halved), "its forward computes something else: outputs differ by"),
    ],
)
def test_what_is_not_of_this_form_is_left(damage, reason):
    model = Towers(MtilBlock, 4)
    damage(model.visual[1])
    kind = type(model.visual[1])
    state = copy.deepcopy(model.state_dict())
    patch = drop_in.patch_moe_adapters4cl(model)
    assert patch.replaced == ["visual.0", "transformer.0", "transformer.1"]
    assert reason in patch.left["visual.1"]
    assert f"visual.1: {patch.left['visual.1']}" in str(patch)
    assert type(model.visual[1]) is kind
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


class Halved(MtilBlock):
    """A user's change to the published block."""

    def forward(self, x: Tensor) -> Tensor:
        return mtil_task.forward(self, x) / 2


def test_later_patches_are_undone_first():
    model = Towers(MtilBlock, 4)
    patch = drop_in.patch_moe_adapters4cl(model)
    later = type(model.visual[0])
    model.visual[0].__class__ = type("Later", (later,), {})
    with pytest.raises(RuntimeError, match=r"visual.0 was changed again"):
        patch.undo()
    assert patch.active
    model.visual[0].__class__ = later
    patch.undo()
    assert type(model.visual[0]) is MtilBlock


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_keeps_the_routing(dtype):
    torch.manual_seed(0)
    model = Towers(MtilBlock, 22)
    twin = copy.deepcopy(model)
    drop_in.patch_moe_adapters4cl(twin)
    with torch.autocast("cpu", dtype=dtype):
        expected, found = (m(*batch()[:2]) for m in (model, twin) if torch.manual_seed(1))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    for a, b in zip(counts(model), counts(twin), strict=True):
        assert torch.equal(a, b)

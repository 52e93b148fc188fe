"""MoE-Adapters against the public code: one block's forward and gradients, and a sequence of tasks with activate-freeze."""

from __future__ import annotations

from typing import Any

import golden_cases as golden
import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels.gating import autograd
from cl_methods.components.adapters import BlockAdapters
from cl_methods.methods import METHODS, Batch, Method
from cl_methods.training.loop import train_on_batches

FORWARD, GRADIENT, WEIGHTS = 1e-5, 2e-5, 5e-5
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias")


def block_modes() -> list[tuple[str, str]]:
    return [(case, mode) for case in golden.names("moe_block_E*") for mode in golden.load(case)[1]["modes"]]


def block_of(tensors: dict[str, Tensor], meta: dict[str, Any], top_k: int) -> BlockAdapters:
    block = BlockAdapters(meta["d"], meta["E"], meta["bottleneck"], top_k, meta["scale"], dropout=0.0)
    block.add_routers(1)
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(block, name).copy_(tensors[name])
        block.routers[0].copy_(tensors["w_gate"])
        block.noises[0].copy_(tensors["w_noise"])
    return block


@pytest.mark.parametrize(("case", "mode"), block_modes())
def test_block(case: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, meta = golden.load(case)
    expected = golden.under(tensors, mode + ".")
    top_k, noisy = int(mode.split(".")[0].removeprefix("k")), mode.endswith("noisy")
    block = block_of(tensors, meta, top_k)
    x = tensors["x1"].clone().requires_grad_()
    if noisy:
        monkeypatch.setattr(torch, "randn", lambda *size, **options: expected["noise"])
    chosen: dict[str, Tensor] = {}
    gating = clk.top_k_gating

    def noting(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        chosen["gates"], chosen["experts"], chosen["usage"] = gating(*args, **options)
        if chosen["gates"].requires_grad:
            chosen["gates"].retain_grad()
        return chosen["gates"], chosen["experts"], chosen["usage"]

    def noting_gradient(gradients: Any) -> Any:
        def noted(grad: Tensor, *rest: Any) -> Any:
            chosen["gradient"] = grad
            return gradients(grad, *rest)

        return noted

    monkeypatch.setattr("cl_kernels.routed.top_k_gating", noting)
    for backend, gradients in autograd.GRADIENTS.items():
        monkeypatch.setitem(autograd.GRADIENTS, backend, noting_gradient(gradients))
    router = block.routers[0], block.noises[0]
    out, usage = block.mix(x, torch.zeros_like(x), *router, training=True, noisy=noisy)
    out.backward(tensors["upstream"])

    dense = torch.zeros_like(expected["gates"]).scatter(1, chosen["experts"], chosen["gates"].detach())
    assert torch.equal(chosen["experts"], expected["indices"])
    assert torch.equal(usage, (expected["gates"] > 0).sum(dim=0))
    assert golden.max_error(dense, expected["gates"]) < FORWARD
    assert golden.max_error(out, expected["out"]) < FORWARD
    gate_gradient = torch.zeros_like(dense).scatter(
        1, chosen["experts"], chosen["gradient"] if "gradient" in chosen else chosen["gates"].grad
    )
    ours = {
        "grad_x1": x.grad,
        "grad_gates": gate_gradient,
        "grad_w_gate": block.routers[0].grad,
        "grad_w_noise": block.noises[0].grad if noisy else torch.zeros_like(block.noises[0]),
        **{f"grad_{name}": getattr(block, name).grad for name in PARAMETERS},
    }
    compare_gradients(ours, expected)
    compare_whole_block(block, tensors, expected, noisy)
    fixed = tensors["x1"].clone().requires_grad_()
    weights = [getattr(block, name) for name in PARAMETERS]
    branch = clk.moe_adapter(fixed, chosen["experts"], chosen["gates"].detach(), *weights, scale=meta["scale"])
    branch.backward(tensors["upstream"])
    assert golden.max_error(fixed.grad, expected["grad_x1_fixed_gates"]) < GRADIENT


def compare_whole_block(
    block: BlockAdapters, tensors: dict[str, Tensor], expected: dict[str, Tensor], noisy: bool
) -> None:
    """The same with x added, which in training may be one operation that shows no gates."""
    block.zero_grad()
    x = tensors["x1"].clone().requires_grad_()
    out = block(x, torch.zeros_like(x), 0, training=True, noise=noisy)
    out.backward(tensors["upstream"])
    assert torch.equal(block.step_usage, (expected["gates"] > 0).sum(dim=0))
    assert golden.max_error(out - x, expected["out"]) < FORWARD
    assert x.grad is not None
    ours = {
        "grad_x1": x.grad - tensors["upstream"],
        "grad_w_gate": block.routers[0].grad,
        "grad_w_noise": block.noises[0].grad if noisy else torch.zeros_like(block.noises[0]),
        **{f"grad_{name}": getattr(block, name).grad for name in PARAMETERS},
    }
    compare_gradients(ours, {name: value for name, value in expected.items() if name != "grad_gates"})


def compare_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every stored gradient: whole, first rows per expert, or of the experts that had samples."""
    seen = set()
    for stored, value in expected.items():
        if not stored.startswith("grad_") or stored == "grad_x1_fixed_gates":
            continue
        name, _, rows = stored.partition("_rows")
        gradient = ours[name]
        if rows:
            gradient = gradient[:, : int(rows)]
        elif len(value) != len(gradient):
            idle = torch.ones(len(gradient), dtype=torch.bool)
            idle[expected["active"]] = False
            assert not gradient[idle].any()
            gradient = gradient[expected["active"]]
        assert golden.max_error(gradient, value) < GRADIENT, stored
        seen.add(name)
    assert seen == set(ours)


def blocks_of(method: Method) -> dict[str, BlockAdapters]:
    """The method's blocks under the names of the file: ``visual.0``, ``text.0`` …"""
    return {name.replace("_", "."): block for name, block in method.adapters.blocks.items()}


def mixture() -> tuple[Method, dict[str, Tensor], dict[str, Any], dict[str, Tensor], golden.TokenTable]:
    """MoE-Adapters with the start weights of the file, without noise, dropout and detector."""
    tensors, meta = golden.load("moe_task")
    data, _ = golden.load("zscl_data")
    table = golden.TokenTable(task1=data["task1.class_tokens"], task2=data["task2.class_tokens"])
    method = METHODS["moe_adapters"](
        golden.tiny_clip(table),
        METHODS["moe_adapters"].Config(
            lr=meta["lr"],
            iterations=meta["iterations"],
            warmup=meta["warmup_length"],
            label_smoothing=meta["label_smoothing"],
            weight_decay=meta["weight_decay"],
            betas=tuple(meta["betas"]),
            experts=meta["E"],
            top_k=meta["k"],
            bottleneck=meta["bottleneck"],
            scale=meta["scale"],
            dropout=0.0,
            gating_noise=False,
            ddas=METHODS["moe_adapters"].default_config("mini").ddas,
        ),
    )
    method.detector = None
    for place, block in blocks_of(method).items():
        routers = [name for name in tensors if name.startswith(f"start.{place}.router")]
        block.add_routers(len(routers))
        with torch.no_grad():
            for name in PARAMETERS:
                getattr(block, name).copy_(tensors[f"start.{place}.{name}"])
            for task in range(len(routers)):
                block.routers[task].copy_(tensors[f"start.{place}.router{task}"])
    return method, tensors, meta, data, table


def feature_tasks() -> list[int]:
    return [
        int(name.removeprefix("features.image.task")) for name in golden.load("moe_task")[0] if "image.task" in name
    ]


@pytest.mark.parametrize("task", feature_tasks())
def test_features(task: int) -> None:
    """Raw features of both towers through each router; -1 bypasses the adapters."""
    method, tensors, _, data, _ = mixture()
    texts = torch.cat([data["task1.class_tokens"], data["task2.class_tokens"]])
    with torch.no_grad(), method.adapters.active(None if task < 0 else task):
        images = method.backbone.model.encode_image(data["task1.images"][0])
        raw_texts = method.backbone.model.encode_text(texts)
        trimmed = method.backbone.encode_texts(texts)
    assert golden.max_error(images, tensors[f"features.image.task{task}"]) < FORWARD
    assert golden.max_error(raw_texts, tensors[f"features.text.task{task}"]) < FORWARD
    expected = tensors[f"features.text.task{task}"]
    assert golden.max_error(trimmed, expected / expected.norm(dim=-1, keepdim=True)) < FORWARD


def test_tasks() -> None:
    """Losses, activation counts, frozen experts, routers and expert weights after each task."""
    method, tensors, meta, data, table = mixture()
    count = sum(name.endswith(".loss") for name in tensors)
    assert count >= 2
    for index in range(count):
        name, losses = f"task{index + 1}", []
        images, labels = data[f"{name}.images"], data[f"{name}.labels"]
        task = golden.task(name, table)
        method.before_task(index, task)
        train_on_batches(
            method,
            [Batch(images[t % len(images)], labels[t % len(images)], t) for t in range(meta["optimiser_steps"])],
            iterations=meta["iterations"],
            warmup=meta["warmup_length"],
            lr=meta["lr"],
            seed=0,
            task_index=index,
            on_step=lambda report, losses=losses: losses.append(report.log.values()["loss"]),
        )
        frozen_before = {place: block.frozen.clone() for place, block in blocks_of(method).items()}
        method.after_task(index, task)
        assert golden.max_error(torch.tensor(losses), tensors[f"task{index}.loss"]) < GRADIENT
        for place, block in blocks_of(method).items():
            expected = golden.under(tensors, f"task{index}.{place}.")
            assert torch.equal(block.usage, expected["counts"]), place
            newly = torch.zeros_like(block.frozen)
            newly[expected["frozen"]] = True
            assert torch.equal(block.frozen, frozen_before[place] | newly), place
            ours = {"router": block.routers[index], **{name: getattr(block, name) for name in PARAMETERS}}
            for stored, value in expected.items():
                name, _, rows = stored.partition("_rows")
                if name in ours:
                    weight = ours[name][:, : int(rows)] if rows else ours[name]
                    assert golden.relative_error(weight, value) < WEIGHTS, (index, place, stored)

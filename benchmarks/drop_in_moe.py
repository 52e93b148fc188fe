"""MoE-Adapters4CL and mammoth's port, as they are and patched: differences in numbers, and the cost of one block's adapters."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from side_by_side import best
from torch import Tensor, nn
from torch.nn import functional as F

from cl_kernels import drop_in
from cl_kernels.profile import ExtraMemory, OperationCount

SMALL = {
    "embed_dim": 64,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 128,
    "vision_patch_size": 8,
    "context_length": 77,
    "vocab_size": 100,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 2,
}
SETTINGS = {
    "task_id": 1,
    "apply_moe": True,
    "is_train": True,
    "ffn_adapt": True,
    "ffn_option": "parallel",
    "ffn_num": 64,
    "autorouter": True,
    "ffn_adapt_where": "AdapterDoubleEncoder",
}
FILES = {"mtil": "mtil/clip/model.py", "cil": "cil/clip/model.py", "mammoth": "models/moe_adapters_utils/model.py"}
EXPERTS = {"mtil": 22, "cil": 2, "mammoth": 2}
Row = dict[str, Any]


def quietly(make: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def adapted(name: str) -> bool:
    return any(part in name for part in ("adaptmlp", "router", "noise"))


def public_model(module: ModuleType, variant: str) -> nn.Module:
    args = SimpleNamespace(**SETTINGS, topk=2, top_k=2, experts_num=EXPERTS[variant])
    call = {"mtil": lambda: module.CLIP(**SMALL, args=args), "cil": lambda: module.CLIP(**SMALL)}
    model = quietly(call.get(variant, lambda: module.CLIP(args, **SMALL)))
    return randomise(model)


def public_block(module: ModuleType, variant: str) -> nn.Module:
    """An image block of ViT-B/16 with as many experts as published."""
    args = SimpleNamespace(**SETTINGS, topk=2, top_k=2, experts_num=EXPERTS[variant])
    block = module.ResidualAttentionBlock
    call = {
        "mtil": lambda: block(768, 12, None, True, args, "image", 0),
        "cil": lambda: block(768, 12, None, "image"),
    }
    return randomise(quietly(call.get(variant, lambda: block(args, 768, 12, None, "image"))))


def randomise(model: nn.Module) -> nn.Module:
    """Experts start as zero functions, with which a comparison would say nothing; all but them and routers is frozen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.05) if adapted(name) else p.requires_grad_(False)
    return model


def differences(module: ModuleType, variant: str) -> Row:
    """Of the loss, its gradients and ten steps of training both towers."""
    torch.manual_seed(0)
    original = public_model(module, variant)
    for part in original.modules():
        if hasattr(part, "down_proj"):
            part.dropout = 0.0
    patched = copy.deepcopy(original)
    state = [(name, value.data_ptr(), value.clone()) for name, value in patched.state_dict().items()]
    patch = getattr(drop_in, "patch_mammoth_moe_adapters" if variant == "mammoth" else "patch_moe_adapters4cl")(patched)
    images, texts = torch.randn(8, 3, 32, 32), torch.randint(1, 99, (5, 77))
    extra = () if variant == "mtil" else (0, True)
    row: Row = {"replaced": len(patch.replaced)}

    def loss(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        image, text = (F.normalize(model(*pair, *extra), dim=-1) for pair in ((images, None), (None, texts)))
        return F.cross_entropy(10 * image @ text.T, torch.arange(8) % 5), torch.cat([image, text])

    for name, optimiser in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        pair = [copy.deepcopy(m).train() for m in (original, patched)]
        optimisers = [optimiser([p for p in m.parameters() if p.requires_grad], lr=1e-3, weight_decay=0) for m in pair]
        for step in range(10):
            results = [loss(m, step) for m in pair]
            for m, (value, _), o in zip(pair, results, optimisers, strict=True):
                m.zero_grad()
                value.backward()
                o.step()
            grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in pair]
            assert grads[0].keys() == grads[1].keys(), "other parameters have gradients"
            if step == 0:
                row["outputs"] = float((results[0][1] - results[1][1]).detach().abs().max())
                row["gradients"] = max(float((grads[0][n] - grads[1][n]).abs().max()) for n in grads[0])
                row["largest gradient"] = max(float(g.abs().max()) for g in grads[0].values())
        weights = zip(*(m.parameters() for m in pair), strict=True)
        row[f"ten steps, {name}"] = max(float((a - b).detach().abs().max()) for a, b in weights)
        for a, b in zip(*(m.modules() for m in pair), strict=True):
            for counts in ("choose_map_image", "choose_map_text"):
                assert not hasattr(a, counts) or torch.equal(getattr(a, counts), getattr(b, counts)), counts
    patch.undo()
    row["undo"] = [type(m) for m in patched.modules()] == [type(m) for m in original.modules()] and all(
        value.data_ptr() == pointer and torch.equal(value, before)
        for value, (_, pointer, before) in zip(patched.state_dict().values(), state, strict=True)
    )
    return row


class Nothing(nn.Module):
    """In the place of a part whose time is not wanted: zeros."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.several = several

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.several else zeros


def costs(module: ModuleType, variant: str, batch: int, rounds: int, whole: bool, clock: Callable[[], float]) -> Row:
    """Time, operations and memory of a block, forward and backward, dropout as published.

    Unless ``whole``, attention and MLP give zeros, and what the block costs without adapters is taken off.
    """
    torch.manual_seed(0)
    original = public_block(module, variant).train()
    if not whole:
        original.attn, original.mlp = Nothing(True), Nothing(False)
    patched, plain = copy.deepcopy(original), copy.deepcopy(original)
    drop_in.patch_moe_adapters4cl(patched)
    # Views as in these towers, which permute images once; and a gradient that is a tensor, not one number expanded.
    x, upstream = (torch.randn(batch, 197, 768).permute(1, 0, 2) for _ in range(2))
    x.requires_grad_()
    if variant == "mtil":
        plain.adapter_flag = False

    def step(block: nn.Module) -> Callable[[], None]:
        def run() -> None:
            block.zero_grad()
            x.grad = None
            if variant != "mtil":
                module.global_taskid = None if block is plain else 0
            block(x).backward(upstream)

        return run

    steps = {"published": step(original), "patched": step(patched), "plain": step(plain)}
    operations, memory = {}, {}
    for name, run in steps.items():
        run()
        with OperationCount() as count:
            run()
        with ExtraMemory(x.device) as extra:
            run()
        operations[name], memory[name] = count.operations, extra.bytes
    seconds = best(steps, rounds, clock)
    row: Row = {"batch": batch, "experts": EXPERTS[variant], "seconds": seconds, "operations": operations}
    row["extra bytes"] = memory
    for name, figures in (("time", seconds), ("operations", operations), ("extra bytes", memory)):
        rest = 0 if whole or figures is memory else figures["plain"]
        row[f"{name}, published / patched"] = (figures["published"] - rest) / (figures["patched"] - rest)
    return row

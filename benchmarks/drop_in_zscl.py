"""ZSCL's helper functions, as they are and patched, on the shapes of a ViT-B/16 CLIP."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from side_by_side import best, load
from torch import Tensor, nn

from cl_kernels import drop_in
from cl_kernels.profile import OperationCount

Row = dict[str, Any]


def load_zscl(root: Path) -> ModuleType:
    """``helpers.py`` with empty modules in the place of what its averages and losses do not need."""
    for name in (
        "clip",
        "clip.clip",
        "public_zscl",
        "public_zscl.datasets",
        "public_zscl.templates",
        "public_zscl.utils",
    ):
        stub = sys.modules[name] = ModuleType(name)
        stub.__path__ = []
        if "." in name:
            setattr(sys.modules[name.partition(".")[0]], name.partition(".")[2], stub)
    return load(root / "mtil" / "src" / "models" / "helpers.py", "public_zscl.models")


def zscl(root: Path, rounds: int, clock: Callable[[], float]) -> Iterator[tuple[str, Row]]:
    """Each function on a ViT-B/16 CLIP's shapes, and the distillation of 64 images against 1,000 and 15,840 captions."""
    helpers = load_zscl(root)
    names = ("distillation", "merge_we", "wise_we", "moving_avg", "l2_loss")
    published = {name: getattr(helpers, name) for name in names}
    torch.manual_seed(0)
    tower = [768, 3072, 768 * 3072, 3072 * 768, 768 * 768, 3 * 768 * 768]
    sizes = (tower * 12 + [512, 2048, 512 * 2048, 2048 * 512, 512 * 512, 3 * 512 * 512] * 12) * 2
    sizes = [s for i, s in enumerate(sizes) if i < 288 // 2] + [1] * 150 + [49408 * 512]
    models = [nn.ParameterList([torch.randn(s) for s in sizes]) for _ in range(3)]

    def consolidate(function: Callable) -> list[Tensor]:
        models[0].zero_grad()
        loss = function(models[0], models[1])
        loss.backward()
        return [loss.detach() / 1e6, *(p.grad for p in models[0])]

    def average(function: Callable, arguments: tuple) -> list[Tensor]:
        function(*arguments)
        return [p.detach() for p in arguments[0 if function.__name__ == "moving_avg" else 1]]

    def distil(function: Callable, captions: int, leaves: tuple[Tensor, Tensor]) -> list[Tensor]:
        t, s = (leaf[:, :captions].clone().requires_grad_() for leaf in leaves)
        loss = function(t, s) + function(t.t(), s.t())
        loss.backward()
        return [loss.detach(), s.grad, t.grad]

    with drop_in.patch_zscl(helpers) as patch:
        assert len(patch.replaced) == len(names), patch
        leaves = tuple(20 + 3 * torch.randn(64, 15840) for _ in range(2))
        calls: dict[str, Callable[[dict[str, Callable]], list[Tensor]]] = {
            "merge_we": lambda f: average(f["merge_we"], (models[0], models[1], 3)),
            "wise_we": lambda f: average(f["wise_we"], (models[0], models[1], 3, models[2], 0.9)),
            "moving_avg": lambda f: average(f["moving_avg"], (models[0], models[2], 0.9)),
            "l2_loss": lambda f: consolidate(f["l2_loss"]),
            "distillation, 1000": lambda f: distil(f["distillation"], 1000, leaves),
            "distillation, 15840": lambda f: distil(f["distillation"], 15840, leaves),
        }
        for name, call in calls.items():
            results, operations = [], {}
            start = [p.detach().clone() for m in models for p in m]
            for which, functions in (("published", published), ("patched", vars(helpers))):
                with torch.no_grad():
                    for p, value in zip((p for m in models for p in m), start, strict=True):
                        p.copy_(value)
                models[0].zero_grad()
                with OperationCount() as count:
                    result = call(functions)
                operations[which] = count.operations
                results.append([t.clone() for t in result])
                del result  # what refers to the memory of a model keeps its averages from being taken in place
            del start
            error = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
            del results
            seconds = best(
                {"published": lambda c=call: c(published), "patched": lambda c=call: c(vars(helpers))}, rounds, clock
            )
            ratio = seconds["published"] / seconds["patched"]
            row = {
                "difference": error,
                "seconds": seconds,
                "operations": operations,
                "time, published / patched": ratio,
            }
            yield name, row

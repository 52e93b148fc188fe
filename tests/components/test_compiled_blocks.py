"""Blocks through torch.compile: the same steps up to rounding, one graph a tower, and sentences where it cannot work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shortened import shortened
from tiny_clip import build_backbone
from torch import Tensor
from torch._dynamo.utils import counters

from cl_methods.components.compiled_blocks import check_compile, compile_blocks
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.config import RunConfig
from cl_methods.training.task import TaskTraining, backbones

CPU = torch.device("cpu")
RAGGED = ((5, 4), (3, 7), (8, 2), (6, 9), (4, 3))
"""Images and letters of the texts of consecutive batches."""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Graphs of other tests count against the number that torch compiles."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses(name: str, tasks: list[Task], reference: Reference, **options: Any) -> list[Tensor]:
    """Of two tasks; compiled where there are options."""
    torch.manual_seed(0)
    method = METHODS[name](build_backbone(), shortened(METHODS[name].default_config("mini")), reference)
    if options:
        compile_blocks(backbones(method), **options)
    found, loss = [], method.loss

    def watched(batch: Batch) -> dict[str, Tensor]:
        terms = loss(batch)
        found.append(terms["loss"].detach().clone())
        return terms

    method.loss = watched  # type: ignore[method-assign]
    for index in range(2):
        TaskTraining(method, index, tasks).execute()
    with torch.no_grad():
        found.append(
            method.backbone.encode_images(torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
        )
    return found


@pytest.mark.parametrize("name", ["zscl", "moe_adapters"])
def test_a_method_trains_as_without(name: str, tasks: list[Task], reference: Reference) -> None:
    """Two tasks, of which the second has another number of texts, and a teacher that is a copy; no graph breaks in a block."""
    expected = losses(name, tasks, reference)
    counters.clear()
    found = losses(name, tasks, reference, backend="eager")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 5


def ragged_step(backbone: Any, images: int, letters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, 16, 16, generator=generator)
    texts = backbone.encode_texts(backbone.tokenize(["x" * (letters + 2 * number) for number in range(letters)]))
    loss = (backbone.encode_images(pixels) @ texts.T).square().sum()
    loss.backward()
    return loss.detach()


def largest_difference(backend: str) -> float:
    """Of losses and gradients of ragged batches, over the largest entry of each."""
    plain, compiled = build_backbone(), build_backbone()
    compile_blocks([compiled], backend=backend)
    worst = 0.0
    for step, (images, letters) in enumerate(RAGGED):
        theirs, ours = (ragged_step(one, images, letters, step) for one in (plain, compiled))
        pairs = [(theirs, ours)]
        for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
            if one.grad is not None:
                pairs.append((one.grad, other.grad))
        worst = max([worst, *(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in pairs)])
    return worst


def test_ragged_batches_and_texts_compile_a_handful() -> None:
    assert largest_difference("aot_eager") < 1e-4
    assert counters["stats"]["unique_graphs"] <= 4
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.slow
def test_the_real_compiler_agrees_to_rounding() -> None:
    worst = largest_difference("inductor")
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4
    assert counters["stats"]["unique_graphs"] <= 4


def test_evaluation_keeps_its_bits() -> None:
    plain, compiled = build_backbone(), build_backbone()
    compile_blocks([compiled], backend="aot_eager")
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(compiled.encode_images(images), plain.encode_images(images))
        names = ["cat", "dog", "a long one"]
        assert torch.equal(compiled.class_embeddings(names, ["a {}."]), plain.class_embeddings(names, ["a {}."]))
    assert not counters["stats"]


def test_what_cannot_work_is_refused(tasks: list[Task], reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["diki"](build_backbone(), shortened(METHODS["diki"].default_config("mini")), reference)
    with pytest.raises(ValueError, match=r"^compile: got 'blocks', but block 0 of the visual tower runs a forward"):
        compile_blocks(backbones(method))
    with pytest.raises(ValueError, match=r"^compile: CUDA graphs need a CUDA device, got cpu; expected 'blocks'"):
        check_compile("cuda_graphs", CPU)
    check_compile("none", CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(
        ValueError, match=r"^compile: .*needs a C\+\+ compiler on a CPU and there is no no-such-compiler"
    ):
        check_compile("blocks", CPU)
    settings = METHODS["zscl"].default_config("mini")
    with pytest.raises(ValueError, match=r"^compile: got 'blocks' with memory_budget '1GiB'; expected one of the two"):
        RunConfig("zscl", settings, compile="blocks", memory_budget="1GiB")
    with pytest.raises(ValueError, match=r"^compile: got 'blocks' with distributed fsdp"):
        RunConfig("zscl", settings, compile="blocks", distributed="fsdp")
    with pytest.raises(ValueError, match=r"^compile: expected one of none, blocks, cuda_graphs, got 'fast'"):
        RunConfig("zscl", settings, compile="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["blocks", "cuda_graphs"])
def test_on_a_gpu(compile: Any) -> None:
    plain, compiled = (build_backbone() for _ in range(2))
    for backbone in (plain, compiled):
        backbone.model.cuda()
        backbone.device = torch.device("cuda")
    compile_blocks([compiled], compile)
    for step in range(6):  # graphs are recorded in the second step and replayed from the third on
        for backbone in (plain, compiled):
            backbone.model.zero_grad(
                set_to_none=True
            )  # as a training step does: a replay writes where its gradients lay
        theirs, ours = (ragged_step(one, 4, 3, step) for one in (plain, compiled))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for (name, one), other in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)

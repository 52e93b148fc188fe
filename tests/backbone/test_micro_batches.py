"""Batches that go through the encoders in parts: the losses, gradients, hooks and random numbers of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from shortened import TRAINED, shortened
from tiny_clip import build_backbone
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches, current_part
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.prompt_attention import MountedPrompts
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.task import TaskTraining

WAYS = {
    "parts that do not divide the batch": MicroBatches(images=4, texts=2, frozen_images=3, frozen_texts=300),
    "parts, block by block": MicroBatches(images=5, texts=300, frozen_images=7, frozen_texts=300, blocks=True),
    "one image at a time": MicroBatches(images=1, texts=250, frozen_images=64, frozen_texts=300, keep_last=True),
}
SINGLE = ("proof", "clap4clip")  # compute in float32 on top of frozen features


@dataclass
class Trace:
    """What a training left behind, step by step.

    Attributes:
        losses: all terms.
        gradients: after ``before_step``, by name.
        hooks: the order in which hooks were called.
        state: of the method at the end.
        after: a number drawn at the end, and the mode of the model.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    after: tuple[float, bool] = (0.0, False)


def train(name: str, tasks: list[Task], reference: Reference, parts: MicroBatches | None, dtype: torch.dtype) -> Trace:
    """Two tasks of two steps each, in ``dtype``."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    backbone = build_backbone()
    backbone.model.to(dtype)
    backbone.train_transform = backbone.eval_transform = lambda image: image.to(dtype) / 127.5 - 1
    backbone.micro_batches = parts
    method, trace = METHODS[name](backbone, shortened(METHODS[name].default_config("mini")), reference), Trace()
    loss, before_step, after_step = method.loss, method.before_step, method.after_step

    def watched_loss(batch: Batch) -> dict[str, Tensor]:
        terms = loss(batch)
        trace.hooks.append("loss")
        trace.losses.append({term: value.item() for term, value in terms.items()})
        return terms

    def watched_before(batch: Batch) -> None:
        before_step(batch)
        trace.hooks.append("before_step")
        named = {one: value.grad for one, value in method.trainable()}
        trace.gradients.append({one: value.clone() for one, value in named.items() if value is not None})

    def watched_after(step: int) -> None:
        after_step(step)
        trace.hooks.append(f"after_step {step}")

    method.loss, method.before_step, method.after_step = watched_loss, watched_before, watched_after  # type: ignore[method-assign]
    for index in [0] if method.joint else range(len(tasks)):
        TaskTraining(method, index, tasks).execute()
    trace.state = {one: value.detach().clone() for one, value in method.state_dict().items()}
    trace.after = torch.rand(()).item(), backbone.model.training
    return trace


@pytest.fixture
def restored_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("restored_dtype")
@pytest.mark.parametrize("name", TRAINED)
def test_parts_train_like_the_whole_batch(name: str, tasks: list[Task], reference: Reference) -> None:
    single = name in SINGLE
    dtype = torch.float32 if single else torch.float64
    whole = train(name, tasks, reference, None, dtype)
    assert len(whole.losses) >= 2
    for way, parts in WAYS.items():
        found = train(name, tasks, reference, parts, dtype)
        assert (found.hooks, found.after) == (whole.hooks, whole.after), way
        for theirs, ours in zip(whole.losses, found.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7 if single else 1e-9), way
        for before, after in zip(whole.gradients, found.gradients, strict=True):
            assert before.keys() == after.keys()
            largest = max(value.abs().max() for value in before.values())
            for one, value in before.items():
                apart = (after[one] - value).abs().max()
                assert apart <= 1e-5 * (largest if single else value.abs().max()) + 1e-12, (way, one)
        for one, value in whole.state.items():
            torch.testing.assert_close(found.state[one], value, rtol=1e-4, atol=1e-6, msg=f"{way}: {one}")


def test_settings_leave_the_default_alone(backbone: Backbone) -> None:
    """Without a plan nothing is cut and no module learns of parts."""
    seen = []
    backbone.model.visual.ln_post.register_forward_hook(lambda *_: seen.append(current_part()))
    backbone.encode_images(torch.zeros(5, 3, 16, 16))
    backbone.micro_batches = MicroBatches(images=2, frozen_images=3)
    backbone.encode_images(torch.zeros(5, 3, 16, 16))
    with torch.no_grad():
        backbone.frozen_copy().encode_images(torch.zeros(5, 3, 16, 16))
    assert seen[0] is None
    assert [(part.first, part.count, part.total) for part in seen[1:]] == [
        (0, 2, 5),
        (2, 2, 5),
        (4, 1, 5),
        (0, 3, 5),
        (3, 2, 5),
    ]


def test_a_forward_of_its_own_survives(backbone: Backbone) -> None:
    """Blocks with adapters or prompts carry one; block by block it is wrapped for the pass, and given back."""
    prompts = MountedPrompts(backbone, depth=1)
    prompts.add(2)
    blocks = [*backbone.model.visual.transformer.resblocks]
    before = [vars(block).get("forward") for block in blocks]
    assert before[0] is not None
    assert before[1] is None
    backbone.micro_batches = MicroBatches(images=2, blocks=True)
    with prompts.active(1):
        backbone.encode_images(torch.rand(3, 3, 16, 16)).sum().backward()
    assert [vars(block).get("forward") for block in blocks] == before
    assert prompts.blocks["visual_0"].keys[1].grad is not None


def test_prompts_of_each_image_are_cut_with_it(backbone: Backbone) -> None:
    prompts = MountedPrompts(backbone, depth=2)
    prompts.add(3)
    torch.nn.init.normal_(prompts.blocks["visual_0"].values[2])
    images, chosen, shares = torch.rand(5, 3, 16, 16), torch.tensor([0, 2, 1, 2, 0]), torch.rand(5)
    features = []
    for parts in (None, MicroBatches(frozen_images=2)):
        backbone.micro_batches = parts
        with torch.no_grad(), prompts.active(chosen, shares):
            features.append(backbone.encode_images(images))
    torch.testing.assert_close(*features)


def test_counts_of_experts_are_those_of_one_pass(backbone: Backbone) -> None:
    adapters = MountedAdapters(backbone, experts=4, text=False)
    for block in adapters.each():
        block.add_routers(1)
    usage = []
    for parts in (None, MicroBatches(images=2), MicroBatches(images=3, blocks=True), MicroBatches(blocks=True)):
        backbone.micro_batches = parts
        torch.manual_seed(0)
        with adapters.active(0, training=True, noise=True):
            features = backbone.encode_images(torch.ones(5, 3, 16, 16))
        features.sum().backward()
        usage.append([block.step_usage.tolist() for block in adapters.each()])
        assert all(sum(counts) == 2 * 5 for counts in usage[-1])
        adapters.end_backward()
    assert usage[1:] == usage[:1] * 3


def test_batch_normalisation_is_refused(backbone: Backbone) -> None:
    backbone.model.visual.extra = nn.BatchNorm1d(4)
    backbone.micro_batches = MicroBatches(images=2)
    backbone.model.train()
    with pytest.raises(ValueError, match="micro_batches: the images of tiny are normalised over their batch"):
        backbone.encode_images(torch.zeros(3, 3, 16, 16))
    backbone.model.eval()
    backbone.encode_images(torch.zeros(3, 3, 16, 16))


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="texts: expected a number of samples >= 1 or None, got 0"):
        MicroBatches(texts=0)

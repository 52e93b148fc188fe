"""The last block at the positions that are read: the features and gradients of all positions, for less."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import build_backbone, tokenize
from torch import Tensor

from cl_kernels.profile import OperationCount
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.backbone.read_out import leaves_out, read_out_of_images
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.backward_order import differentiate_last

TEXTS = ["a photo of a cat", "a dog", "sky"]


def step(trims: bool, *, dropout: float = 0.0, parts: MicroBatches | None = None) -> dict[str, Tensor]:
    """Features, usage and gradients of a step in float64; the shapes that went through the last block's MLPs."""
    backbone = build_backbone()
    backbone.model.double().requires_grad_(False)
    backbone.trims_last_block, backbone.micro_batches = trims, parts
    adapters = MountedAdapters(backbone, experts=5, bottleneck=4, dropout=dropout).double()
    torch.manual_seed(3)
    for block in adapters.each():
        block.add_routers(1)
    with torch.no_grad():
        for value in adapters.parameters():
            value.normal_(std=0.3)
    found: dict[str, Tensor] = {}
    for name, tower in (("visual", backbone.model.visual), ("text", backbone.text_tower)):
        mlp = tower.transformer.resblocks[-1].mlp
        mlp.register_forward_hook(
            lambda _, given, __, n=name: found.update({f"{n} tokens": torch.tensor(given[0].shape[1])})
        )
    torch.manual_seed(7)
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    with adapters.active(0, training=True, noise=True):
        features, texts = backbone.encode_images(images), backbone.encode_texts(tokenize(TEXTS))
    (features @ texts.T).square().sum().backward()
    found |= {"images": features.detach(), "texts": texts.detach()}
    found |= {f"grad {name}": value.grad for name, value in adapters.named_parameters() if value.grad is not None}
    return found | {f"usage {i}": block.step_usage for i, block in enumerate(adapters.each())}


@pytest.mark.parametrize("parts", [None, MicroBatches(images=2, texts=1), MicroBatches(images=2, texts=2, blocks=True)])
def test_features_and_gradients_are_those_of_all_positions(parts):
    expected, found = step(False), step(True, parts=parts)
    assert (found.pop("visual tokens"), found.pop("text tokens")) == (1, 2), "class token; first token and end of text"
    assert expected.pop("visual tokens") == 5
    assert expected.pop("text tokens") > 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any() or "usage" in name or "noises" in name, name
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_drop_what_the_whole_batch_drops():
    whole, parts = step(True, dropout=0.5), step(True, dropout=0.5, parts=MicroBatches(images=2, texts=1))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_and_bare_models_compute_all_positions():
    backbone = build_backbone()
    images, mlp = torch.rand(2, 3, 16, 16), backbone.model.visual.transformer.resblocks[-1].mlp
    seen: list[int] = []
    mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    backbone.encode_images(images)
    adapters = MountedAdapters(backbone, experts=2)
    for block in adapters.each():
        block.add_routers(1)
    with adapters.active(0):
        backbone.encode_images(images)
    with adapters.active(0, training=True):
        backbone.model.encode_image(images)  # whoever asks the model may look at what comes beside the feature
        with torch.no_grad():
            backbone.encode_images(images)
    with adapters.active(None, training=True):
        backbone.encode_images(images)
    assert seen == [5] * 5


def test_towers_that_read_more_than_one_token_are_left():
    visual = build_backbone().model.visual
    assert read_out_of_images(visual) is not None
    for name, value in (("pool_type", "avg"), ("output_tokens", True), ("attn_pool", torch.nn.Identity())):
        other = build_backbone().model.visual
        setattr(other, name, value)
        assert read_out_of_images(other) is None, name
    block = visual.transformer.resblocks[-1]
    assert leaves_out(block, None)
    assert leaves_out(block, torch.zeros(5, 5))
    assert not leaves_out(block, torch.zeros(8, 5, 5))
    assert not leaves_out(torch.nn.Identity(), None)


def test_the_backward_pass_takes_what_is_to_come_last_last():
    order: list[str] = []
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    for name, value in (("a", a), ("b", b)):
        value.register_post_accumulate_grad_hook(lambda _, n=name: order.append(n))
    for chosen in (False, True):
        first, second = a.exp().exp().exp(), b.exp().sin()
        if chosen:
            differentiate_last(second)
        with OperationCount():
            (first * second).sum().backward()
    assert order == ["b", "a", "a", "b"]
    differentiate_last(torch.ones(2))

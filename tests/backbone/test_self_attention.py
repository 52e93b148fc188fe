"""Attention of open_clip's blocks in fewer operations: the same features, gradients and models as without it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_clip import build_backbone, build_model, tokenize, transform
from torch import Tensor

from cl_kernels.profile import OperationCount
from cl_methods.backbone import Backbone
from cl_methods.backbone.self_attention import fuse_attention, separate_attention, takes_self_attention

import open_clip  # isort: skip

TEXTS = ["a photo of a cat", "a dog", "sky"]


def plain_backbone() -> Backbone:
    backbone = build_backbone()
    separate_attention(backbone.model)
    return backbone


def gradients(backbone: Backbone) -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    backbone.model.double().train()
    loss = (backbone.encode_images(images) @ backbone.encode_texts(tokenize(TEXTS)).T).square().sum()
    loss.backward()
    return loss.detach(), {
        name: value.grad for name, value in backbone.model.named_parameters() if value.grad is not None
    }


def test_features_and_gradients_are_those_of_open_clip() -> None:
    (expected, theirs), (found, ours) = gradients(plain_backbone()), gradients(build_backbone())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_without_gradients_the_bits_are_those_of_open_clip() -> None:
    images = torch.rand(5, 3, 16, 16)
    for one, other in ((build_backbone(), plain_backbone()),):
        with torch.no_grad():
            assert torch.equal(one.encode_images(images), other.encode_images(images))
            assert torch.equal(one.frozen_text_features(tokenize(TEXTS)), other.frozen_text_features(tokenize(TEXTS)))


def test_a_block_dispatches_fewer_operations() -> None:
    counted = []
    for backbone in (plain_backbone(), build_backbone()):
        block = backbone.model.visual.transformer.resblocks[1].train()
        x = torch.randn(3, 5, 32, requires_grad=True)
        with OperationCount() as counting:
            block(x).sum().backward()
        counted.append(counting.operations)
    assert counted[1] <= counted[0] - 6, counted


def test_copies_use_their_own_weights_and_names_stay() -> None:
    backbone = build_backbone()
    assert list(backbone.model.state_dict()) == list(build_model().state_dict())
    teacher = copy.deepcopy(backbone.model)
    with torch.no_grad():
        for value in backbone.model.parameters():
            value.add_(torch.randn_like(value))
    images = torch.rand(2, 3, 16, 16)
    expected = build_model().encode_image(images)
    torch.testing.assert_close(teacher.encode_image(images), expected, rtol=1e-4, atol=1e-5)
    separate_attention(teacher)
    assert all("attention" not in vars(block) for block in teacher.visual.transformer.resblocks)


def test_what_is_hooked_or_of_another_kind_keeps_its_own_code() -> None:
    backbone, seen = build_backbone(), []
    block = backbone.model.visual.transformer.resblocks[0]
    handle = block.attn.register_forward_hook(lambda *_: seen.append("called"))
    backbone.encode_images(torch.rand(2, 3, 16, 16))
    assert seen == ["called"]
    handle.remove()
    backbone.encode_images(torch.rand(2, 3, 16, 16))
    assert seen == ["called"]
    custom = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1, "qk_norm": True},
    )
    fuse_attention(custom)
    assert ["attention" in vars(one.transformer.resblocks[0]) for one in (custom.visual, custom)] == [True, False]
    assert not takes_self_attention(torch.nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_come_in_either_order_of_their_memory(channels_last: bool) -> None:
    images = torch.rand(4, 3, 16, 16)
    given = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    backbone = Backbone(build_model(), tokenize, transform, transform, name="tiny")
    torch.testing.assert_close(
        backbone.encode_images(given), build_backbone().encode_images(images), rtol=1e-5, atol=1e-6
    )

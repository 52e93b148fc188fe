"""Prompts packed as trees: what is shared, what is seen, and the features of the same prompts row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, tokenize
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.backbone.text_tower import TextTower
from cl_methods.backbone.text_trees import plant
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.prompt_attention import MountedPrompts

TEXTS = ["a photo of ant", "a photo of bee", "bee", "a photo of ant", "a photo", "the cat", "a photo of antelopes"]


def lengths(tokens: Tensor) -> Tensor:
    return tokens.argmax(dim=1) + 1


def test_shared_beginnings_are_stored_once() -> None:
    tokens = torch.tensor([[1, 5, 6, 9, 0], [1, 5, 7, 9, 0], [1, 5, 6, 9, 0], [1, 8, 9, 0, 0]])
    trees = plant(tokens, lengths(tokens))
    assert trees.tokens.tolist() == [[1, 5, 6, 9, 7, 9, 8, 9]]
    assert trees.depths.tolist() == [[0, 1, 2, 3, 2, 3, 1, 2]]
    assert trees.ends.tolist() == [[8, 6, 4, 4, 6, 6, 8, 8]]
    assert (trees.rows.tolist(), trees.places.tolist()) == ([0] * 4, [3, 5, 3, 7])
    seen = trees.mask(2, torch.float32) == 0
    assert seen.shape == (2, 8, 8)
    assert seen[1, 5].nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_rows_are_bounded_and_padding_sees_itself() -> None:
    tokens = tokenize(TEXTS)
    trees = plant(tokens, lengths(tokens), capacity=14)
    assert trees.tokens.shape[1] <= 14
    assert len(trees.tokens) > 1
    for index, length in enumerate(lengths(tokens).tolist()):
        row, place = trees.rows[index], trees.places[index]
        path = [p for p in range(int(place) + 1) if trees.ends[row, p] > place]
        assert trees.tokens[row, path].tolist() == tokens[index, :length].tolist()
        assert trees.depths[row, path].tolist() == list(range(length))
    assert trees.mask(1, torch.float64).isfinite().any(dim=-1).all()


@pytest.mark.parametrize("mounted", ["nothing", "adapters", "prompts"])
@pytest.mark.parametrize("text", [{"pool_type": "argmax"}, {"pool_type": "eos", "eos_id": 99}, {"ls_init_value": 0.3}])
def test_features_are_those_of_rows(mounted: str, text: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_methods.backbone.text_trees.CAPACITY", 14)
    backbone = build_backbone(**text)
    tokens = tokenize(TEXTS)
    plain = backbone.frozen_text_features(tokens)
    found, expected = compute(backbone, tokens, mounted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(expected, plain) == (mounted == "nothing")
    assert not found.requires_grad


def compute(backbone: Backbone, tokens: Tensor, mounted: str) -> tuple[Tensor, Tensor]:
    if mounted == "nothing":
        return backbone.prompt_features(tokens), backbone.frozen_text_features(tokens)
    if mounted == "adapters":
        adapters = MountedAdapters(backbone, experts=3, bottleneck=4)
        for block in adapters.each():
            block.add_routers(1)
            for value in block.parameters():
                torch.nn.init.normal_(value)
        active = adapters.active(0)
    else:
        prompts = MountedPrompts(backbone, depth=2, length=2)
        prompts.add(1)
        for _, value in prompts.of_task(0):
            torch.nn.init.normal_(value)
        active = prompts.active(0, 0.5)
    with active:
        return backbone.prompt_features(tokens), backbone.frozen_text_features(tokens)


@pytest.mark.parametrize("why", ["looks ahead", "foreign block", "micro-batches"])
def test_others_fall_back_to_rows(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_backbone(**({"no_causal_mask": True} if why == "looks ahead" else {}))
    if why == "foreign block":
        block = backbone.text_tower.transformer.resblocks[1]
        block.forward = block.forward
    if why == "micro-batches":
        backbone.micro_batches = MicroBatches(frozen_texts=2)
    monkeypatch.setattr(TextTower, "tree_features", None)
    tokens = tokenize(TEXTS)
    assert torch.equal(backbone.prompt_features(tokens), backbone.frozen_text_features(tokens))

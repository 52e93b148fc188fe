"""Prompts beside the attention: against the formula, mounted and taken off again."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import build_backbone
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.components.prompt_attention import MountedPrompts, residual_prompt_attention


def by_definition(
    x: Tensor, layer: nn.MultiheadAttention, keys: Tensor, values: Tensor, weight: Tensor, mask: Tensor | None
) -> Tensor:
    """Head by head and sample by sample."""
    width, heads = x.shape[2], layer.num_heads
    per_head = width // heads
    out = torch.zeros_like(x)
    for sample in range(len(x)):
        q, k, v = (x[sample] @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
        rows = []
        for head in range(heads):
            part = slice(head * per_head, (head + 1) * per_head)
            scores = q[:, part] @ k[:, part].T / per_head**0.5
            own = q[:, part] @ keys[sample][:, part].T / per_head**0.5
            scores = scores if mask is None else scores + mask
            injected = own.softmax(dim=-1) @ values[sample][:, part]
            rows.append(scores.softmax(dim=-1) @ v[:, part] + weight[sample] * injected)
        out[sample] = torch.cat(rows, dim=1) @ layer.out_proj.weight.T + layer.out_proj.bias
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("samples", "length", "width", "heads", "prompts"), [(3, 5, 12, 3, 4), (1, 1, 8, 1, 1)])
def test_formula_and_gradients(samples: int, length: int, width: int, heads: int, prompts: int, causal: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(width, heads, batch_first=True).double()
    nn.init.normal_(layer.in_proj_bias)
    mask = torch.full((length, length), -torch.inf).triu(1) if causal else None
    x = torch.randn(samples, length, width, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, samples, prompts, width, dtype=torch.float64).unbind()
    weight = torch.rand(samples, dtype=torch.float64)
    expected = by_definition(x, layer, keys, values, weight, None if mask is None else mask.double())
    torch.testing.assert_close(residual_prompt_attention(x, layer, keys, values, weight, mask), expected)
    shared = [part[:1].expand_as(part) for part in (keys, values)]
    once, half = torch.ones(samples), torch.full((samples,), 0.5)
    for given, meant in ((None, once), (0.5, half), (torch.tensor(0.5), half)):
        found = residual_prompt_attention(x, layer, keys[0], values[0], given, mask)
        wanted = by_definition(x, layer, *shared, meant.double(), None if mask is None else mask.double())
        torch.testing.assert_close(found, wanted)
    leaves = [part.clone().requires_grad_() for part in (x.detach(), keys, values, weight)]
    assert torch.autograd.gradcheck(
        lambda x, keys, values, weight: residual_prompt_attention(x, layer, keys, values, weight, mask), leaves
    )


def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_bypass_is_exact_and_removal_complete(backbone: Backbone) -> None:
    texts = backbone.tokenize(["ant", "bee"])
    names = list(backbone.model.state_dict())
    before = backbone.encode_images(images()), backbone.encode_texts(texts)
    prompts = MountedPrompts(backbone, depth=8, length=3)
    assert len(prompts) == 0
    prompts.add(2)
    assert len(prompts) == 2
    assert list(backbone.model.state_dict()) == names
    assert torch.equal(backbone.encode_images(images()), before[0])
    for weight in (None, 0.3):  # values are still zero
        with prompts.active(1, weight):
            torch.testing.assert_close(backbone.encode_images(images()), before[0])
            torch.testing.assert_close(backbone.encode_texts(texts), before[1])
    torch.manual_seed(3)
    with torch.no_grad():
        for value in prompts.parameters():
            value.normal_()
    with prompts.active(1):
        changed = backbone.encode_images(images()), backbone.encode_texts(texts)
    for ours, theirs in zip(changed, before, strict=True):
        assert (ours - theirs).abs().max() > 1e-3
    assert torch.equal(backbone.encode_images(images()), before[0])
    prompts.remove()
    with prompts.active(1):
        assert torch.equal(backbone.encode_images(images()), before[0])
    MountedPrompts(backbone)


def test_each_sample_may_have_prompts_and_a_weight_of_its_own(backbone: Backbone) -> None:
    prompts = MountedPrompts(backbone, depth=1, length=3)
    prompts.add(3)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in prompts.parameters():
            value.normal_()
    tasks, weights = torch.tensor([2, 0, 1, 2, 0]), torch.tensor([0.0, 1.0, 0.2, 0.7, 0.4])
    with prompts.active(tasks, weights):
        together = backbone.encode_images(images())
    for row, image in enumerate(images()):
        with prompts.active(int(tasks[row]), float(weights[row])):
            torch.testing.assert_close(backbone.encode_images(image[None])[0], together[row])


def test_depth_and_counts(backbone: Backbone) -> None:
    prompts = MountedPrompts(backbone, depth=1, length=3)
    assert list(prompts.blocks) == ["visual_0", "text_0"]
    prompts.add(2)
    named = prompts.of_task(1)
    assert [name for name, _ in named] == ["visual_0.keys.1", "visual_0.values.1", "text_0.keys.1", "text_0.values.1"]
    keys, values = named[0][1], named[1][1]
    assert keys.shape == values.shape == (3, 32)
    assert not values.any()
    assert (keys.abs() <= 1).all()
    assert keys.std() > 0.3


def test_only_plain_blocks_and_only_once(backbone: Backbone) -> None:
    MountedPrompts(backbone)
    with pytest.raises(ValueError, match="block 0 of the visual tower already carries"):
        MountedPrompts(backbone)
    other = build_backbone()
    other.model.transformer.resblocks[1].attn.batch_first = False
    with pytest.raises(
        TypeError, match="prompts need open_clip's ResidualAttentionBlock, batch first; text_1 is another"
    ):
        MountedPrompts(other)
    MountedPrompts(other, depth=1)

"""CLIP text towers, patched and unpatched: features, gradients, ten steps, bytes, the work saved, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from clip_structures import CONTEXT, WIDTH, HuggingFaceStyle, OpenAIStyle, texts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cl_kernels import drop_in
from cl_methods.torchvision_compat import prepare_torchvision

prepare_torchvision()

import open_clip  # noqa: E402


def open_clip_model(kind: str, **text) -> nn.Module:
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4}
    text = {"context_length": CONTEXT, "vocab_size": 50, "width": WIDTH, "heads": 2, "layers": 2} | text
    return getattr(open_clip.model, kind)(embed_dim=8, vision_cfg=vision, text_cfg=text)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "OpenAI": (OpenAIStyle, "text tower", 49),
    "open_clip": (lambda: open_clip_model("CLIP"), "text tower", 49),
    "open_clip, text tower of its own": (lambda: open_clip_model("CustomTextCLIP"), "text", 49),
    "open_clip, end by id": (lambda: open_clip_model("CustomTextCLIP", pool_type="eos", eos_id=7), "text", 7),
    "Hugging Face, largest id": (lambda: HuggingFaceStyle(2), "text_model", 49),
    "Hugging Face, end by id": (lambda: HuggingFaceStyle(7), "text_model", 7),
}


def encode(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.encode_text(tokens) if hasattr(model, "encode_text") else model(tokens)


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, nn.Module, drop_in.Patch, int]:
    torch.manual_seed(0)
    make, name, end = MODELS[request.param]
    model = make()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    patch = drop_in.patch_clip(twin)
    assert torch.equal(torch.get_rng_state(), state)
    assert patch.replaced == [name]
    return model, twin, patch, end


@pytest.mark.parametrize("lengths", [[4, 9, 6], [1, 2, 1], [CONTEXT, 3, 5]])
def test_features_and_ten_steps(case, lengths):
    model, twin, patch, end = case
    tokens, labels = texts(lengths, end), torch.arange(3)
    with torch.no_grad():
        expected, found = (encode(m, tokens) for m in (model, twin))
    torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)
    for m in (model, twin):
        m.double()  # so that nothing but a difference of the procedures adds up
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for _ in range(10):
        features = [encode(m, tokens) for m in (model, twin)]
        for m, optimiser, f in zip((model, twin), optimisers, features, strict=True):
            m.zero_grad()
            F.cross_entropy(f, labels).backward()
            optimiser.step()
        for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert name == q[0]
            assert (p.grad is None) == (q[1].grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q[1].grad, p.grad, atol=1e-9, rtol=1e-9)
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-9, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    patch.undo()


def test_undo_and_work(case):
    model, twin, patch, end = case
    tokens = texts([4, 6], end)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert repr(twin) == repr(model)
    flops = []
    with torch.no_grad():
        for m in (model, twin):
            with FlopCounterMode(display=False) as count:
                encode(m, tokens)
            flops.append(count.get_total_flops())
        assert flops[0] / flops[1] > 0.8 * CONTEXT / 6
        duplicate = copy.deepcopy(twin)
        expected = encode(twin, tokens)
        for p in duplicate.parameters():
            p.mul_(1.5)
        assert not torch.allclose(encode(duplicate, tokens), expected)
        patch.undo()
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert [set(vars(m)) for m in twin.modules()] == [set(vars(m)) for m in model.modules()]
        assert torch.equal(encode(twin, tokens), encode(model, tokens))


def test_a_method_keeps_its_other_arguments():
    model = OpenAIStyle()
    tokens = texts([3, 5])
    expected = model.encode_text(tokens, scale=3.0)
    with drop_in.patch_clip(model):
        torch.testing.assert_close(model.encode_text(tokens, scale=3.0), expected)
        torch.testing.assert_close(model(tokens), expected / 3)


def test_hidden_states_that_are_asked_for_are_whole():
    model = HuggingFaceStyle(2)
    tokens = texts([4, 6])
    drop_in.patch_clip(model)
    assert model.text_model(tokens).last_hidden_state.shape == (2, 6, WIDTH)
    assert model.text_model(tokens, output_hidden_states=True).last_hidden_state.shape == (2, CONTEXT, WIDTH)


def test_masked_padding_is_cut_with_the_texts():
    model = HuggingFaceStyle(7)
    tokens = texts([4, 6], 7)
    options = {"attention_mask": (tokens != 0).long(), "position_ids": torch.arange(CONTEXT).flip(0)[None]}
    expected = model(tokens, **options)
    drop_in.patch_clip(model)
    torch.testing.assert_close(model(tokens, **options), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OpenAIStyle(causal=False), "its attention is not causal"),
        (lambda: OpenAIStyle(read="mean"), "not read at the end of the text: features differ by"),
        (lambda: open_clip_model("CustomTextCLIP", no_causal_mask=True), "its attention is not causal"),
        (lambda: open_clip_model("CustomTextCLIP", pool_type="last"), "pooling is 'last'"),
        (lambda: open_clip_model("CustomTextCLIP", embed_cls=True), "a class token"),
        (lambda: nn.Linear(2, 2), r"expected a causal text tower"),
    ],
)
def test_what_cannot_be_cut_is_left(make, reason):
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=reason):
        drop_in.patch_clip(model)
    assert [type(m) for m in model.modules()] == kinds


def test_a_second_patch_is_refused():
    model = OpenAIStyle()
    drop_in.patch_clip(model)
    with pytest.raises(ValueError, match="text tower: already patched"):
        drop_in.patch_clip(model)
    with pytest.raises(TypeError, match="model: got str"):
        drop_in.patch_clip("ViT-B-16")

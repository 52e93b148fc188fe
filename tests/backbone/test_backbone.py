"""The backbone: exact trimming, classifiers in one batch, loading weights, transforms."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import CONTEXT, build_backbone, open_clip, tokenize
from torch import Tensor, nn

from cl_methods.backbone import Backbone, load_backbone, prompt
from cl_methods.backbone.text_tower import TextTower
from cl_methods.backbone.transforms import image_transforms

TEXTS = ["ant", "a photo of bee", "the long description of a cat", "eel"]
PREPROCESS = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "interpolation": "bicubic"}


def untrimmed(backbone: Backbone, tokens: Tensor) -> Tensor:
    features = backbone.model.encode_text(tokens)
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("pool", [{"pool_type": "argmax"}, {"pool_type": "eos", "eos_id": 99}])
def test_trimming_is_exact(pool: dict[str, Any]) -> None:
    backbone = build_backbone(**pool)
    tokens = tokenize(["ant", "bee eel"])
    assert backbone.trim_texts(tokens).shape[1] < CONTEXT
    weight, gradients = torch.randn(2, 16), []
    for encode in (backbone.encode_texts, lambda tokens: untrimmed(backbone, tokens)):
        backbone.model.zero_grad(set_to_none=True)
        (encode(tokens) * weight).sum().backward()
        named = backbone.model.named_parameters()
        gradients.append({name: value.grad for name, value in named if value.grad is not None})
    torch.testing.assert_close(backbone.encode_texts(tokens), untrimmed(backbone, tokens), rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_a_text_without_end_is_read_where_open_clip_reads_it(backbone: Backbone) -> None:
    tokens = torch.tensor([[1, 5, 98, 7, 6, 5, 4, 3, 2, 5, 6, 7]])
    assert backbone.trim_texts(tokens).shape == (1, 3)
    torch.testing.assert_close(backbone.encode_texts(tokens), untrimmed(backbone, tokens), rtol=1e-5, atol=1e-6)


def test_models_that_look_ahead_are_not_trimmed() -> None:
    backbone = build_backbone(no_causal_mask=True)
    tokens = tokenize(TEXTS[:1])
    assert backbone.trim_texts(tokens).shape[1] == CONTEXT
    assert torch.equal(backbone.encode_texts(tokens), untrimmed(backbone, tokens))


def test_features_in_chunks_keep_their_order(backbone: Backbone) -> None:
    tokens = tokenize(TEXTS)
    whole = backbone.frozen_text_features(tokens)
    torch.testing.assert_close(backbone.frozen_text_features(tokens, chunk=2), whole, rtol=1e-5, atol=1e-6)
    assert not whole.requires_grad


def test_class_embeddings_in_one_pass(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    templates, names = ("a {}.", "{} here"), ("ant", "bee", "cat")
    rows = []
    for name in names:
        mean = untrimmed(backbone, tokenize([template.format(name) for template in templates])).mean(dim=0)
        rows.append(mean / mean.norm())
    calls, original = [], TextTower._features_of
    monkeypatch.setattr(
        TextTower, "_features_of", lambda self, trees: calls.append(len(trees.rows)) or original(self, trees)
    )
    found = backbone.class_embeddings(names, templates)
    torch.testing.assert_close(found, torch.stack(rows).detach(), rtol=1e-5, atol=1e-6)
    assert calls == [6]


def test_frozen_copy_has_weights_of_its_own(backbone: Backbone) -> None:
    copy = backbone.frozen_copy()
    with torch.no_grad():
        backbone.model.visual.proj.add_(1)
    assert not torch.equal(copy.model.visual.proj, backbone.model.visual.proj)
    assert not any(value.requires_grad for value in copy.model.parameters())


def test_arguments_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, H, W\), got \(2, 16\)"):
        backbone.encode_images(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"tokens: expected \(N, L\) with L <= 12, got \(1, 13\)"):
        backbone.encode_texts(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="template: expected exactly one"):
        prompt("a photo", "cat")
    with pytest.raises(ValueError, match="expected class names and templates"):
        backbone.class_embeddings([], ["{}"])


@pytest.fixture
def tiny_name(tmp_path: Path) -> str:
    """An open_clip model name of our own."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    return "tiny-test"


def test_weights_from_a_file(tiny_name: str, tmp_path: Path) -> None:
    model = open_clip.create_model(tiny_name)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = load_backbone(tiny_name, str(tmp_path / "w.safetensors"))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert backbone.tokenize(["a cat"]).shape == (1, 77)
    image = torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8)
    for convert in (backbone.train_transform, backbone.eval_transform):
        assert convert(image).shape == (3, 16, 16)


class _Holder(nn.Module):
    """A scriptable tree of parameters, as in OpenAI's archives."""

    def forward(self) -> int:
        return 0


def test_openai_archive_into_a_gelu_model_warns(tiny_name: str, tmp_path: Path) -> None:
    model, root = open_clip.create_model(tiny_name), _Holder()
    for name, value in model.state_dict().items():
        *path, leaf = name.split(".")
        place: nn.Module = root
        for part in path:
            if not hasattr(place, part):
                setattr(place, part, _Holder())
            place = getattr(place, part)
        place.register_buffer(leaf, value.half() if value.ndim > 1 else value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(root).save(str(tmp_path / "archive.pt"))
    with pytest.warns(UserWarning, match="tiny-test-quickgelu"):
        backbone = load_backbone(tiny_name, str(tmp_path / "archive.pt"))
    assert backbone.model.visual.proj.dtype == torch.float32
    torch.testing.assert_close(backbone.model.visual.proj, model.visual.proj, rtol=1e-3, atol=1e-3)


def test_loading_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="model: expected 'mini' or one of"):
        load_backbone("ViT-B-99")
    with pytest.raises(ValueError, match="pretrained: ViT-B-16 needs weights"):
        load_backbone("ViT-B-16")
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.pt' is neither a file nor a tag"):
        load_backbone("ViT-B-16", "nowhere.pt")
    with pytest.raises(ValueError, match="'mini' brings its own weights"):
        load_backbone("mini", "x.pt")


def test_missing_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> nn.Module:
        raise RuntimeError("no connection")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", fail)
    with pytest.raises(FileNotFoundError, match=r"not on disk and could not be downloaded.*pass the file's path"):
        load_backbone("ViT-B-16-quickgelu", "openai")


def test_transforms_take_pictures_and_tensors() -> None:
    train, evaluate = image_transforms(PREPROCESS)
    array = torch.randint(0, 255, (3, 20, 30), dtype=torch.uint8)
    picture = Image.fromarray(array.permute(1, 2, 0).numpy())
    for convert in (train, evaluate):
        for image in (array, picture):
            out = convert(image)
            assert out.shape == (3, 16, 16)
            assert out.dtype == torch.float32
    assert torch.equal(evaluate(picture), evaluate(picture))


def test_mini_loads() -> None:
    backbone = load_backbone("mini")
    features = backbone.encode_texts(backbone.tokenize(["a picture of a star."]))
    assert torch.allclose(features.norm(dim=-1), torch.ones(1))

"""Weights in every form that people have, the activation that they were trained with, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_clip import CUSTOM, GELU, QUICK, SIZES, archive, build, copied, half, hugging_face, prefixed
from torch import Tensor

from cl_methods.backbone import load_backbone, planned_weights
from cl_methods.cli import main
from cl_methods.weights import activation, fingerprint, read_weights


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return copied(build(QUICK))


def optimiser() -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


def write(form: str, state: dict[str, Tensor], folder: Path) -> tuple[Path, str]:
    """(file, what it should be found to be)."""
    path = folder / "weights.pt"
    if form == "safetensors":
        path = folder / "weights.safetensors"
        save_file(state, path)
    elif form == "state dict":
        torch.save(state, path)
    elif form == "openai state dict":
        torch.save(half(state) | SIZES, path)
    elif form == "open_clip training":
        name = f"2024_05_01-10_00_00-model_{QUICK}-lr_0.0005-b_64-j_4-p_amp"
        content = {"epoch": 3, "name": name, "state_dict": prefixed(state, "module."), "optimizer": optimiser()}
        torch.save(content, path)
    elif form == "compiled":
        torch.save({"state_dict": prefixed(state, "module._orig_mod."), "epoch": 1}, path)
    elif form == "zscl":
        torch.save({"state_dict": state}, path)
    elif form == "archive":
        model = build(QUICK)
        archive(model, path)
    elif form == "hugging face":
        path = folder / "model.safetensors"
        save_file(hugging_face(state), path)
        (folder / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "quick_gelu"}}))
    return path, form


FORMS = {
    "safetensors": ("safetensors", None),
    "state dict": ("state dict", None),
    "openai state dict": ("state dict", True),
    "open_clip training": ("training checkpoint", True),
    "compiled": ("training checkpoint", None),
    "zscl": ("training checkpoint", False),
    "archive": ("TorchScript archive", True),
    "hugging face": ("safetensors of Hugging Face's transformers", True),
}
"""Form -> (what it is called, whether the activation is certain; None where nothing tells)."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path, _ = write(form, state, tmp_path)
    called, certain = FORMS[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = load_backbone(QUICK, str(path))
    expected = {name: value.float() for name, value in half(state).items()} if form == "openai state dict" else state
    assert backbone.model.state_dict().keys() == expected.keys()
    for name, value in backbone.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].reshape(value.shape)), name
    origin = backbone.origin
    assert origin is not None
    assert (origin.form, origin.activation, origin.source) == (called, "QuickGELU", str(path))
    assert origin.fingerprint == fingerprint(expected)
    assert len(origin.sha256 or "") == 64
    assert bool(origin.notes) == (certain is not True)
    assert called in origin.sentence()


@pytest.mark.parametrize("form", [form for form, (_, certain) in FORMS.items() if certain])
def test_quick_gelu_weights_are_refused_by_a_gelu_model(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path, _ = write(form, state, tmp_path)
    with pytest.raises(ValueError, match=rf"trained with QuickGELU .* {GELU} uses GELU.*Use the model '{QUICK}'"):
        load_backbone(GELU, str(path))


def test_what_is_probable_warns_and_what_is_unknown_is_said(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, _ = write("zscl", state, tmp_path)
    with pytest.warns(UserWarning, match=rf"probably trained with QuickGELU.*as ZSCL's code saves.*'{QUICK}'"):
        load_backbone(GELU, str(path))
    path, _ = write("safetensors", state, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        origin = load_backbone(GELU, str(path)).origin
    assert origin is not None
    assert "nothing in the file says with which activation it was trained; GELU is assumed" in origin.notes[0]


def test_gelu_weights_are_refused_by_a_quick_gelu_model(state: dict[str, Tensor], tmp_path: Path) -> None:
    archive(build(GELU), tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors", {"activation": "GELU"})
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 32}}))
    for name in ("a.pt", "b.safetensors", "open_clip_model.safetensors"):
        with pytest.raises(ValueError, match=rf"trained with GELU .* {QUICK} uses QuickGELU.*Use the model '{GELU}'"):
            load_backbone(QUICK, str(tmp_path / name))


def test_tags_are_held_against_the_architecture_before_anything_is_downloaded() -> None:
    with pytest.raises(ValueError, match=r"'openai' was trained with QuickGELU.*Use the model 'ViT-B-16-quickgelu'"):
        load_backbone("ViT-B-16", "openai")
    with pytest.raises(FileNotFoundError, match="neither a file nor a tag of ViT-B-16-quickgelu"):
        load_backbone("ViT-B-16-quickgelu", "laion2b_s34b_b88k")


def test_openais_names_into_a_model_with_a_text_tower_of_its_own(state: dict[str, Tensor], tmp_path: Path) -> None:
    path, _ = write("open_clip training", state, tmp_path)
    found = load_backbone(CUSTOM, str(path)).model.state_dict()
    assert torch.equal(found["text.token_embedding.weight"], state["token_embedding.weight"])
    assert {name.removeprefix("text.") for name in found} == state.keys()
    assert all(torch.equal(value, state[name.removeprefix("text.")]) for name, value in found.items())


def test_released_files_are_recognised_by_their_bytes(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = activation._released()
    assert table["5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"][1] == "openai"
    path, _ = write("safetensors", state, tmp_path)
    digest = read_weights(path).sha256
    monkeypatch.setattr(activation, "_released", lambda: {digest[:8]: ("ViT-B-16", "openai")})
    with pytest.raises(ValueError, match=r"trained with QuickGELU \(open_clip's list says so of 'openai'\)"):
        load_backbone(GELU, str(path))
    origin = load_backbone(QUICK, str(path)).origin
    assert origin is not None
    assert (origin.released_as, origin.notes) == ("openai", ())


def test_a_model_that_does_not_fit_is_told_name_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(state)
    del changed["visual.ln_post.bias"]
    changed["visual.extra"] = torch.zeros(2)
    changed["visual.proj"] = torch.zeros(5, 32)
    torch.save(changed, tmp_path / "w.pt")
    message = (
        rf"w\.pt \(state dict\) does not fit {QUICK}: it lacks visual\.ln_post\.bias; {QUICK} does not know its visual\.extra; "
        r"of another shape are visual\.proj \(5, 32\) for \(128, 32\)"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(QUICK, str(tmp_path / "w.pt"))


class Code:
    """What a file that runs code when it is read looks like."""


def test_damaged_and_dangerous_files_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(QUICK, str(tmp_path / "w.pt"))
        assert str(tmp_path / "w.pt") in str(caught.value)

    torch.save({"state_dict": state, "args": Code()}, tmp_path / "w.pt")
    refused(r"would run code that it brings.*torch\.save\(model\.state_dict\(\), path\)")
    torch.save([1, 2], tmp_path / "w.pt")
    refused("holds a list; expected a state dict")
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "w.pt")
    refused("these are no tensors: epoch, best")
    torch.save({}, tmp_path / "w.pt")
    refused("these are no tensors: nothing")
    torch.save(state, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: len(content) // 2])
    refused("cannot be read as a file of torch.save")
    (tmp_path / "w.pt").write_bytes(b"<html>not found</html>")
    refused("would run code|cannot be read")
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"w\.safetensors is not a complete safetensors file"):
        load_backbone(QUICK, str(tmp_path / "w.safetensors"))
    archive(build(QUICK), tmp_path / "whole.pt")
    content = bytearray((tmp_path / "whole.pt").read_bytes())
    middle = content.index(b"constants.pkl")
    content[middle + 60 : middle + 90] = bytes(30)
    (tmp_path / "w.pt").write_bytes(content)
    refused(r"w\.pt (is a damaged|cannot be read)")
    broken = hugging_face(state)
    del broken["text_model.encoder.layers.0.self_attn.q_proj.bias"]
    torch.save(broken, tmp_path / "w.pt")
    refused(r"unknown or incomplete are transformer\.resblocks\.0\.attn\.in_proj_bias")


def test_folders_bring_their_own_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"brings its own weights; got 'x\.pt'"):
        load_backbone(f"local-dir:{tmp_path}", "x.pt")
    with pytest.raises(
        FileNotFoundError, match=r"needs open_clip_config\.json and one of open_clip_model\.safetensors"
    ):
        load_backbone(f"local-dir:{tmp_path}")


def test_the_fingerprint_is_of_the_weights_alone(state: dict[str, Tensor]) -> None:
    shuffled = dict(reversed(list(state.items()))) | {"logit_scale": state["logit_scale"].reshape(1)}
    assert fingerprint(shuffled) == fingerprint(state)
    assert fingerprint({**state, "visual.proj": state["visual.proj"] + 1e-6}) != fingerprint(state)
    assert fingerprint(prefixed(state, "x.")) != fingerprint(state)


def test_mini_says_what_it_is() -> None:
    origin = load_backbone("mini").origin
    assert origin is not None
    assert (origin.source, origin.activation) == ("embedded", "GELU")


def test_a_dry_run_says_what_it_would_load(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write("openai state dict", state, tmp_path)
    command = [
        "run",
        "--dry-run",
        "--method",
        "zero_shot",
        "--output",
        str(tmp_path / "run"),
        "--pretrained",
        str(path),
    ]
    assert main([*command, "--model", QUICK]) == 0
    assert f"weights of {QUICK}: {path} (state dict, sha256 " in capsys.readouterr().out
    assert main([*command, "--model", GELU]) == 2
    assert f"Use the model '{QUICK}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert "tag 'openai' of open_clip, downloaded unless they are on disk" in planned_weights(
        "ViT-B-16-quickgelu", "openai"
    )
    with pytest.raises(ValueError, match="Use the model 'ViT-B-16-quickgelu'"):
        planned_weights("ViT-B-16", "openai")

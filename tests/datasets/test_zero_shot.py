"""``clk data check --zero-shot``: miniatures through the command, published values and what is thought of differences."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from miniatures import ORIGINALS
from safetensors.torch import save_file
from tiny_clip import open_clip

from cl_methods.cli import main
from cl_methods.datasets.specification import DATASETS
from cl_methods.evaluation.zero_shot import FULL_MODEL, PublishedZeroShot, published_zero_shot, verdict
from cl_methods.scenarios.mtil import ORDERS

PART = "EuroSAT,MNIST,OxfordPet"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero-shot")
    for name in PART.split(","):
        ORIGINALS[name](folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small CLIP with random weights in a folder of open_clip."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def check(root: Path, *arguments: str) -> int:
    return main(["data", "check", "--root", str(root), "--datasets", PART, "--sizes", "any", *arguments])


def test_miniatures_with_an_offline_model(root, model, capsys):
    assert check(root, "--zero-shot", "--model", model, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert f"zero-shot accuracy of {model}" in text
    assert f"weights of {model}: " in text
    for name in PART.split(","):
        assert f"{name} " in text.split("zero-shot accuracy")[1]
    assert text.count("no published value") == 3
    assert "mean of these" not in text


def test_values_beside_the_published_ones(root, model, capsys, monkeypatch):
    """As if the miniatures were whole: two as published, one that differs, and the exit status says so."""
    values = iter([PublishedZeroShot(0.0, "someone", 100.0), PublishedZeroShot(50.0, "someone", 60.0),
                   PublishedZeroShot(150.0, "someone", 0.5)])  # fmt: skip
    monkeypatch.setattr("cl_methods.commands.zero_shot.published_zero_shot", lambda *given: next(values))
    assert check(root, "--zero-shot", "--model", model, "--device", "cpu") == 1
    text = capsys.readouterr().out
    for part in (
        "differs by more than 0.5",
        "someone",
        "mean of these",
        "comes from other weights, another activation",
    ):
        assert part in text


def test_options_are_checked(root, capsys):
    for arguments, message in (
        (("--pretrained", "x.pt"), "pretrained: has a meaning with --zero-shot only"),
        (("--zero-shot", "--model", "mini"), "model: 'mini' knows the words of its own world only"),
        (("--zero-shot",), f"pretrained: {FULL_MODEL} needs weights"),
        (("--zero-shot", "--batch-size", "0"), "batch_size: expected a number >= 1, or auto, got 0"),
        (("--zero-shot", "--pretrained", "nowhere.pt"), "neither a file nor a tag"),
    ):
        assert check(root, *arguments) == 2
        assert message in capsys.readouterr().err


def test_published_values_of_openais_vit_b_16():
    expected = dict(zip(ORDERS["I"], (24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2), strict=True))
    for name, value in expected.items():
        images = DATASETS[name].sizes["zscl"][2]
        for tag in ("openai", None):
            found = published_zero_shot(FULL_MODEL, tag, name, "zscl", images)
            assert isinstance(found, PublishedZeroShot)
            assert found.accuracy == value
            assert found.tolerance == pytest.approx(0.5, abs=1e-9) or (
                DATASETS[name].single and 0.9 < found.tolerance < 2.1
            )
    assert sum(expected.values()) / 11 == pytest.approx(65.3, abs=0.05)


def test_where_nothing_or_something_else_was_published():
    images = DATASETS["Food101"].sizes["zscl"][2]
    other = published_zero_shot("ViT-B-16", "laion2b_s34b_b88k", "Food101", "zscl", images)
    assert isinstance(other, PublishedZeroShot)
    assert (other.accuracy, other.source) == (86.63, "open_clip, its own prompts")
    assert "1,000 test images, published ones are of 25,250" in published_zero_shot(
        FULL_MODEL, None, "Food101", "zscl", 1000
    )
    assert "no published value for ViT-B-16 with these weights" in published_zero_shot(
        "ViT-B-16", None, "Food101", "zscl", images
    )
    coop = published_zero_shot(FULL_MODEL, "openai", "OxfordPet", "coop", DATASETS["OxfordPet"].sizes["coop"][2])
    assert coop == f"no published value for {FULL_MODEL} with 'openai' and coop prompts"


def test_verdicts():
    exact, loose = PublishedZeroShot(88.5, "a", 0.5), PublishedZeroShot(51.35, "b", 10.0, same_prompts=False)
    assert verdict(88.9, exact) == (True, "as published")
    assert verdict(87.9, exact) == (False, "differs by more than 0.5")
    assert verdict(59.4, loose) == (True, "near, other prompts")
    assert verdict(20.0, loose)[0] is False


def test_the_table_of_open_clip_is_whole():
    with files("cl_methods.evaluation").joinpath("published_zero_shot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) - {"model", "pretrained"} <= set(ORDERS["I"])
    assert len({(row["model"], row["pretrained"]) for row in rows}) == len(rows) == 12
    assert all(0 < float(row[name]) < 100 for row in rows for name in ORDERS["I"] if name in row)

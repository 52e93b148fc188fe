"""Scenario ``mtil`` from files to a result, the command that checks the files, and reference data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import ORIGINALS, write, write_coop
from PIL import Image
from tiny_clip import build_backbone, transform

from cl_methods.cli import main
from cl_methods.commands.configuration import ConfigurationError, parse
from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS
from cl_methods.methods import METHODS
from cl_methods.scenarios import ScenarioOptions, load
from cl_methods.scenarios.mtil import ORDERS
from cl_methods.training import run as run_module
from cl_methods.training.checkpoints import RunDirectoryError

PART = "EuroSAT,MNIST,OxfordPet"


def from_file(image: Image.Image) -> torch.Tensor:
    return transform(torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All eleven datasets, each as its original files."""
    folder = tmp_path_factory.mktemp("mtil")
    for write_original in ORIGINALS.values():
        write_original(folder)
    return folder


@pytest.fixture
def run(monkeypatch):
    """``run(output, arguments …)``: what ``clk run`` does, over the tiny CLIP."""

    def build(config, scenario, device):
        backbone = build_backbone()
        backbone.train_transform = backbone.eval_transform = from_file
        return METHODS[config.method](backbone, config.effective_settings(), scenario.reference)

    def start(output, *arguments, resume=False):
        config, _ = parse(["--scenario", "mtil", "--device", "cpu", *map(str, arguments)], "")
        return run_module.run(config, output, resume=resume)

    monkeypatch.setattr(run_module, "build_method", build)
    return start


def test_orders_hold_every_dataset_once():
    assert set(ORDERS["I"]) == set(ORDERS["II"]) == set(ORIGINALS) <= set(DATASETS)
    assert ORDERS["I"] == tuple(sorted(ORDERS["I"], key=str.casefold))
    assert [ORDERS["I"].index(name) for name in ORDERS["II"]] == [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]


def test_the_whole_scenario(root):
    scenario = load("mtil", ScenarioOptions(root=root, sizes="any"), order="II")
    assert tuple(task.name for task in scenario.tasks) == ORDERS["II"]
    assert sum(len(task.class_names) for task in scenario.tasks) == 1201
    assert scenario.notes["DTD"].startswith("original files, split zscl, fingerprint ")
    assert load("mtil", ScenarioOptions(root=root, sizes="any"), order="II").fingerprint() == scenario.fingerprint()
    few = load("mtil", ScenarioOptions(root=root, sizes="any", shots=1), order="II")
    assert [len(task.train) for task in few.tasks] == [len(task.class_names) for task in few.tasks]
    assert few.fingerprint() != scenario.fingerprint()


def test_training_and_evaluation(root, run, tmp_path):
    arguments = ("--data.root", root, "--data.sizes", "any", "--order", PART, "--method", "finetune")
    arguments += ("--limit-iterations", 3)
    result = run(tmp_path / "run", *arguments)
    assert result["tasks"] == PART.split(",")
    assert np.shape(result["accuracy"]) == (3, 3)
    assert result["data"]["MNIST"].startswith("original files, split zscl")
    assert result["train"]["samples"] == 3 * 4 * METHODS["finetune"].default_config("mtil").batch_size
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    again = run(tmp_path / "again", *arguments, "--workers", 2)
    assert again["accuracy"] == result["accuracy"]


def test_distillation_from_a_folder_of_images_and_captions(root, run, tmp_path):
    for number in range(6):
        write(tmp_path / "reference" / "n01440764" / f"{number}.JPEG", number, number)
    (tmp_path / "captions.txt").write_text("a fish\na bird\n\na tree\n")
    arguments = [
        "--data.root",
        root,
        "--data.sizes",
        "any",
        "--order",
        PART,
        "--method",
        "zscl",
        "--limit-iterations",
        2,
    ]
    arguments += ["--limit-tasks", 1, "--data.reference-images", tmp_path / "reference"]
    result = run(tmp_path / "run", *arguments, "--data.reference-captions", tmp_path / "captions.txt")
    assert len(result["accuracy"]) == 1
    with pytest.raises(ValueError, match="reference_texts: this scenario has no captions"):
        run(tmp_path / "other", *arguments)


def test_a_run_is_not_resumed_on_other_data(root, run, tmp_path, monkeypatch):
    arguments = ["--data.root", root, "--data.sizes", "any", "--order", "EuroSAT", "--method", "zero_shot"]
    run(tmp_path / "run", *arguments)
    (tmp_path / "run" / "result.json").unlink()
    run(tmp_path / "run", *arguments, resume=True)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"data\.shots was None, now 1"):
        run(tmp_path / "run", *arguments, "--data.shots", 1, resume=True)
    ORIGINALS["EuroSAT"](tmp_path / "changed")
    (tmp_path / "changed" / "eurosat" / "2750" / "River" / "River_3.jpg").unlink()
    arguments[1] = tmp_path / "changed"
    with pytest.raises(RunDirectoryError, match="the data of scenario mtil has changed"):
        run(tmp_path / "run", *arguments, resume=True)


def test_few_shots_have_settings_of_their_own(tmp_path):
    arguments = ["--scenario", "mtil", "--method", "moe_adapters"]
    full, few = METHODS["moe_adapters"].default_config("mtil"), METHODS["moe_adapters"].default_config("mtil_few_shot")
    assert full != few
    assert parse(arguments, "")[0].settings == full
    config = parse([*arguments, "--data.shots", "5"], "")[0]
    assert (config.settings, config.data.shots) == (few, 5)
    assert parse([*arguments, "--data.shots=16", "--method.iterations", "7"], "")[0].settings == dataclasses.replace(
        few, iterations=7
    )
    file = tmp_path / "config.yaml"
    file.write_text("scenario: mtil\nmethod: moe_adapters\ndata:\n  shots: 5\n  split: coop\n")
    config = parse(["--config", str(file)], "")[0]
    assert (config.settings, config.data.shots, config.data.split) == (few, 5, "coop")
    assert parse(["--config", str(file), "--data.shots", "1"], "")[0].data.shots == 1
    with pytest.raises(ConfigurationError, match=r"data\.shots: .*got 'many'"):
        parse([*arguments, "--data.shots", "many"], "")


@pytest.mark.parametrize(
    ("options", "order", "message"),
    [
        ({"root": None}, "I", r"data\.root: scenario mtil needs the folder"),
        ({}, "Aircaft", r"order: there is no dataset 'Aircaft'; did you mean Aircraft\?"),
        ({}, "MNIST,flowers", r"there is no dataset 'flowers'; did you mean Flowers102\?"),
        ({}, "III", r"order: there is no dataset 'III'; there are the orders I, II, X-TAIL and the datasets Aircraft"),
        ({}, "MNIST,MNIST", r"order: each dataset can be named once, got 'MNIST,MNIST'"),
        ({"shots": -1}, "I", r"data\.shots: expected a number >= 1, got -1"),
        ({"sizes": "published"}, "DTD,MNIST", r"94 / 47 / 47 images of DTD.*; .*20 / 0 / 10 images of MNIST"),
        ({"split": "coop"}, "EuroSAT", r"split_zhou_EuroSAT\.json is missing"),
        (
            {"reference_captions": Path("/nowhere.txt")},
            "MNIST",
            r"data\.reference_captions: /nowhere\.txt cannot be read",
        ),
        ({"reference_images": Path("/nowhere")}, "MNIST", r"data\.reference_images: /nowhere is not a directory"),
        (
            {"cache_gib": 0.0},
            "MNIST",
            r"data\.cache_gib: expected a number > 0, got 0\.0; --data\.cache none keeps nothing",
        ),
        ({"cache": __file__}, "MNIST", r"data\.cache: .*test_mtil\.py is a file; give a folder, or none"),
    ],
)
def test_what_cannot_be_run(options, order, message, root):
    with pytest.raises(DataError, match=message):
        load("mtil", ScenarioOptions(**{"root": root, "sizes": "any", **options}), order=order)


def test_check_lists_what_is_there(root, capsys):
    assert main(["data", "check", "--root", str(root), "--sizes", "any", "--decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(ORDERS["I"])
    assert lines[6].split() == [
        "EuroSAT",
        "original",
        "files",
        "eurosat",
        "10",
        "40",
        "/",
        "0",
        "/",
        "10",
        lines[6].split()[-1],
    ]
    assert main(["data", "check", "--root", str(root), "--sizes", "any", "--shots", "1", "--datasets", "EuroSAT"]) == 0
    few = capsys.readouterr().out.splitlines()[2].split()
    assert few[5:10] == ["10", "/", "0", "/", "10"]
    assert few[-1] != lines[6].split()[-1]


def test_check_says_what_is_missing_and_what_is_wrong(tmp_path, capsys):
    write_coop(tmp_path, "EuroSAT")
    assert main(["data", "check", "--root", str(tmp_path), "--split", "coop", "--datasets", "EuroSAT,DTD"]) == 1
    out = capsys.readouterr().out
    assert "EuroSAT  not as it should be" in out
    assert "published split coop has 13,500 / 5,400 / 8,100" in out
    assert f"DTD is not in {tmp_path}. Put it into {tmp_path / 'dtd'}, with split_zhou_DescribableTextures.json" in out
    arguments = ["data", "check", "--root", str(tmp_path), "--split", "coop", "--datasets", "EuroSAT", "--sizes", "any"]
    assert main(arguments) == 0
    damaged = tmp_path / "eurosat" / "2750" / "River" / "image_0003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    assert main(arguments) == 0
    assert main([*arguments, "--decode"]) == 1
    assert f"{damaged} is not a readable image" in capsys.readouterr().out
    assert main(["data", "check", "--root", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_a_root_that_holds_nothing_points_to_the_datasets_beside_or_below_it(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    ORIGINALS["EuroSAT"](tmp_path / "data")
    for wrong in (tmp_path, tmp_path / "data" / "eurosat"):
        assert main(["data", "check", "--root", str(wrong)]) == 1
        assert (
            f"There are datasets in {tmp_path / 'data'}: was --root {tmp_path / 'data'} meant?"
            in capsys.readouterr().out
        )
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", "--root", str(tmp_path / "empty")]) == 1
    out = capsys.readouterr().out
    assert out.count("WebDataset shards") == out.count("docs/datasets.md") == 1
    places = ", ".join(str(tmp_path / "empty" / name) for name in ORDERS["I"])
    assert f"Or copies as image folders, WebDataset shards or Hugging Face tables into {places}." in out
    assert main(["data", "check", "--root", str(tmp_path / "empty"), "--datasets", "MNIST"]) == 1
    out = capsys.readouterr().out
    assert (
        f"; or a copy as image folders, WebDataset shards or Hugging Face tables into {tmp_path / 'empty' / 'MNIST'}."
        in out
    )
    assert f"MNIST is not in {tmp_path / 'empty'}. Put it into {tmp_path / 'empty' / 'MNIST' / 'raw'}" in out
    assert "There are datasets" not in out
    assert "with {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, with or without .gz, in it" in out


def test_a_run_without_data_says_in_one_sentence_what_lists_the_rest(tmp_path, capsys):
    ORIGINALS["MNIST"](tmp_path)
    line = ["run", "--scenario", "mtil", "--data.root", str(tmp_path), "--dry-run"]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert f"10 of 11 datasets are not there, or not complete, in {tmp_path}: Aircraft, Caltech101, CIFAR100" in error
    assert "SUN397 --split" not in error
    assert f"`clk data check --root {tmp_path} --datasets Aircraft,Caltech101," in error
    assert "20 / 0 / 10 images of MNIST" in error
    assert len(error) < 1000
    assert main([*line[:-2], str(tmp_path / "nowhere"), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("is not a directory") == 1
    assert main(["run", "--scenario", "mtil", "--dry-run"]) == 2
    assert (
        "data.root: scenario mtil needs the folder that holds the datasets; `clk data check --root"
        in capsys.readouterr().err
    )

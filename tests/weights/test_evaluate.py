"""Checkpoints measured again: the numbers of the run, in other label spaces and scopes and on other data, and never unfairly."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from small_clip import QUICK, build, copied
from tiny_clip import build_backbone, noise_images

from cl_methods.cli import main
from cl_methods.commands.configuration import parse
from cl_methods.datasets.images import FileImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.evaluation import figures
from cl_methods.evaluation.boards import arrange
from cl_methods.evaluation.results import read_result
from cl_methods.methods import METHODS
from cl_methods.scenarios.base import Scenario
from cl_methods.seeding import derive_seed
from cl_methods.training import building, evaluating
from cl_methods.training import run as run_module

DETECTOR = ("--method.ddas.iterations", "3", "--method.ddas.generic-iterations", "3")
OPTIONS = {
    "moe_adapters": DETECTOR,
    "ranpac": ("--method.width", "50"),
    "loranpac": ("--method.width", "50"),
    "clap4clip": ("--method.epochs", "None"),
}
QUICKLY = ("moe_adapters", "zscl", "icarl", "joint")
TRAINED = [
    pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow) for name in METHODS if METHODS[name].trains
]


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """Three tasks of noise, which runs and evaluations take for ``mini``, over the tiny CLIP."""
    tasks = []
    for index, names in enumerate((("ant", "bee", "cat"), ("dog", "eel"), ("fox", "bee"))):
        images = [noise_images(16, 10 * index + part, len(names), 70 + 60 * index) for part in range(3)]
        tasks.append(Task(f"task{index}", names, ("a photo of {}", "{} again"), *images))
    reference = Reference(noise_images(20, 99, 1, 128), ("one thing", "two", "three things", "a fourth"))
    scenario = Scenario("mini", "I", tuple(tasks), reference)

    def made(config, scenario, device):
        torch.manual_seed(derive_seed(config.seed, "build"))
        return METHODS[config.method](build_backbone(), config.effective_settings(), scenario.reference)

    monkeypatch.setattr(building, "load_scenario", lambda name, options, order: scenario)
    for module in (run_module, evaluating):
        monkeypatch.setattr(module, "build_method", made)
    return scenario


def learn(method: str, output: Path, *options: str) -> dict[str, Any]:
    fixed = ["--device", "cpu", "--method", method, "--limit-iterations", "2"]
    small = ["--method.batch-size", "8"] if METHODS[method].trains else []
    config, _ = parse([*fixed, *small, *OPTIONS.get(method, ()), *options], "")
    return run_module.run(config, output)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


SPACES = ("--evaluation.label-space", "all", "task", "seen")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest."""
    for name in ("accuracy_over_time", "matrix"):
        monkeypatch.setattr(figures, name, lambda board: Figure())


@pytest.mark.parametrize("method", TRAINED)
def test_checkpoints_give_the_numbers_of_the_run(
    method: str, noise: Scenario, undrawn: None, tmp_path: Path, capsys
) -> None:
    """To the bit, in all label spaces, though the checkpoints follow one another in one instance of the method."""
    expected = learn(method, tmp_path / "run", *SPACES)
    assert main(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    result = read(tmp_path / "again" / "result.json")
    assert result["evaluated_from"]["changed"] == []
    for found, known in [
        (result, expected),
        *((result["label_spaces"][s], expected["label_spaces"][s]) for s in ("task", "seen")),
    ]:
        assert (found["zero_shot"], found["accuracy"]) == (known["zero_shot"], known["accuracy"])
        assert (found["transfer"], found["last"], found["chance"]) == (
            known["transfer"],
            known["last"],
            known["chance"],
        )
        errors = [row for one in (found, known) for row in (torch.tensor(one["calibration_error_per_row"]),)]
        torch.testing.assert_close(*errors)
    for name in ("train", "tasks", "scenario_fingerprint", "evaluated", "config", "method", "seed", "order"):
        assert result[name] == expected[name], name
    assert "are equal to those" in capsys.readouterr().out


def test_other_label_spaces_are_those_of_a_run_that_measured_them(
    noise: Scenario, undrawn: None, tmp_path: Path, capsys
) -> None:
    learn("finetune", tmp_path / "run")
    expected = learn("finetune", tmp_path / "all", *SPACES)
    assert main(["evaluate", str(tmp_path / "run"), *SPACES, "--output", str(tmp_path / "again")]) == 0
    result = read(tmp_path / "again" / "result.json")
    assert result["label_spaces"] == expected["label_spaces"]
    assert (result["accuracy"], result["zero_shot"]) == (expected["accuracy"], expected["zero_shot"])
    assert result["evaluated_from"]["changed"] == ["evaluation.label_space was task, now ['all', 'task', 'seen']"]
    printed = capsys.readouterr().out
    assert f"12 of these accuracies were measured in {tmp_path / 'run'} before, and are equal to those" in printed
    assert {"accuracy.png", "matrix.png", "report.md", "config.yaml"} < {
        path.name for path in (tmp_path / "again").iterdir()
    }
    boards, notes = arrange([read_result(tmp_path / name / "result.json") for name in ("run", "again")])
    assert [board.conditions["label_space"] for board in boards] == ["task", "all", "seen"]
    assert [len(board.groups) for board in boards] == [1, 1, 1]
    assert "have the same method, settings and seed; the first is counted" in notes[0]


def test_scope_is_changed_without_learning_again(noise: Scenario, undrawn: None, tmp_path: Path) -> None:
    learn("diki", tmp_path / "run")
    line = ["evaluate", str(tmp_path / "run"), "--method.scope", "batch", "--output", str(tmp_path / "again")]
    assert main(line) == 0
    result, expected = (
        read(tmp_path / "again" / "result.json"),
        learn("diki", tmp_path / "b", "--method.scope", "batch"),
    )
    assert (result["accuracy"], result["config"]["method"]["scope"]) == (expected["accuracy"], "batch")
    assert result["evaluated_from"]["changed"] == ["method.scope was sample, now batch"]


def test_means_of_exemplars_are_known_by_name_where_the_images_are_not(noise: Scenario, tmp_path: Path) -> None:
    """What iCaRL has learnt counts in another run, not only the texts that it started with."""
    expected = learn("icarl", tmp_path / "run")
    config, _ = parse(["--device", "cpu", "--weights", str(tmp_path / "run"), "--evaluation.only"], "")
    assert run_module.run(config, tmp_path / "measured")["zero_shot"] == expected["accuracy"][-1]


def test_some_checkpoints_have_rows_and_no_result(noise: Scenario, tmp_path: Path, capsys) -> None:
    expected = learn("finetune", tmp_path / "run")
    line = ["evaluate", str(tmp_path / "run"), "--checkpoints", "1,last", "--evaluation.label-space", "task", "all"]
    assert main(line) == 0
    found = read(tmp_path / "run-evaluated" / "evaluation.json")
    assert found["rows"] == ["after task0", "after task2"]
    assert found["label_spaces"]["task"]["accuracy"] == [expected["accuracy"][0], expected["accuracy"][2]]
    assert found["evaluated_from"]["checkpoints"] == [1, 3]
    assert not (tmp_path / "run-evaluated" / "result.json").exists()
    assert "label space all" in (tmp_path / "run-evaluated" / "report.md").read_text()
    assert "6 of these accuracies were measured" in capsys.readouterr().out
    assert main(line) == 0  # the next one lies beside it
    assert (tmp_path / "run-evaluated-2" / "evaluation.json").is_file()


def test_part_of_the_tasks_and_of_the_images(noise: Scenario, undrawn: None, tmp_path: Path) -> None:
    expected = learn("finetune", tmp_path / "run")
    line = ["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "part")]
    assert main([*line, "--limit-tasks", "2", "--evaluation.label-space", "task", "seen"]) == 0
    found = read(tmp_path / "part" / "evaluation.json")
    assert found["label_spaces"]["task"]["accuracy"] == [
        row[:2] for row in (expected["zero_shot"], *expected["accuracy"])
    ]
    line[-1] = str(tmp_path / "few")
    assert main([*line, "--evaluation.limit", "4"]) == 0
    assert read(tmp_path / "few" / "result.json")["evaluated"]["images"] == [4, 4, 4]


def test_an_interrupted_run_has_the_rows_of_its_checkpoints(noise: Scenario, tmp_path: Path) -> None:
    learn("finetune", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert main(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    assert len(read(tmp_path / "again" / "evaluation.json")["rows"]) == 4


REFUSED = {
    "a checkpoint that is not there": (
        "finetune",
        [],
        ["--checkpoints", "5"],
        r"has 0 \(before learning\) and 1, 2, 3; got 5",
    ),
    "a number that is none": (
        "finetune",
        [],
        ["--checkpoints", "first"],
        r"checkpoints: expected all, or numbers .* got 'first'",
    ),
    "another seed": ("finetune", [], ["--seed", "1"], r"seed: the run in .* has 0, got 1; only data, evaluation"),
    "another method": ("finetune", [], ["--method", "zscl"], r"method: the run in .* has finetune, got zscl"),
    "another model": ("finetune", [], ["--model", "ViT-B-16"], r"model: the run in .* has mini, got ViT-B-16"),
    "other sizes": ("ranpac", [], ["--method.width", "60"], r"width 50, the settings say 60"),
    "what learns nothing": ("zero_shot", [], [], r"has no checkpoint of a finished task; what learns nothing"),
    "an option of running": ("finetune", [], ["--resume"], r"resume: has no meaning for `clk evaluate`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, noise: Scenario, tmp_path: Path, capsys) -> None:
    method, before, now, message = REFUSED[case]
    learn(method, tmp_path / "run", *before)
    capsys.readouterr()
    try:
        status: int | None = main(["evaluate", str(tmp_path / "run"), *now, "--output", str(tmp_path / "out")])
    except SystemExit as stopped:  # tyro's
        status = int(stopped.code or 0)
    found = capsys.readouterr()
    assert status == 2
    assert re.search(message, " ".join((found.err + found.out).split())), found.err
    assert not (tmp_path / "out").exists()


def test_data_that_has_changed_is_refused(noise: Scenario, tmp_path: Path, capsys, monkeypatch) -> None:
    learn("finetune", tmp_path / "run")
    other = dataclasses.replace(noise.tasks[0], test=noise_images(16, 77, 3))
    changed = dataclasses.replace(noise, tasks=(other, *noise.tasks[1:]))
    monkeypatch.setattr(building, "load_scenario", lambda name, options, order: changed)
    for options in ((), ("--limit-tasks", "1")):
        assert main(["evaluate", str(tmp_path / "run"), *options]) == 2
        assert "data: that of scenario mini has changed since the run in" in capsys.readouterr().err


def test_a_damaged_checkpoint_leaves_nothing_behind(noise: Scenario, tmp_path: Path, capsys) -> None:
    learn("finetune", tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "task01" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert f"{file} is not what was written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument is the directory of a run"),
        (["--checkpoints", "last"], "the first argument is the directory of a run"),
        (["nowhere"], "nowhere holds no run (no run.json); expected the output directory of `clk run`"),
    ],
)
def test_no_run(arguments: list[str], message: str, capsys) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], Path]:
    """``files(name)``: a folder for scenario ``folders``, two tasks of two classes, as photographs on disk."""

    def write(name: str) -> Path:
        for task, (first, second) in {"one": ("red", "green"), "two": ("blue", "grey")}.items():
            for part, count in (("train", 4), ("test", 3)):
                for place, kind in enumerate((first, second)):
                    folder = tmp_path / name / task / part / f"{kind}{name}"
                    folder.mkdir(parents=True)
                    for number in range(count):
                        color = (60 * place, 20 * number, 40 * len(name))
                        Image.new("RGB", (40, 30), color).save(folder / f"{part}{number}.png")
        return tmp_path / name

    return write


def test_images_are_decoded_once_and_encoded_once_for_each_state(
    files, undrawn: None, tmp_path: Path, monkeypatch
) -> None:
    """Of a run whose checkpoints are measured in three label spaces, and on folders that it has not learnt."""
    torch.save({"state_dict": copied(build(QUICK)), "epoch": 1}, tmp_path / "start.pt")
    model = ("--model", QUICK, "--pretrained", str(tmp_path / "start.pt"))
    fixed = ("--device", "cpu", "--data.validation-fraction", "0", "--method", "finetune", "--method.batch-size", "4")
    root, run = files("own"), tmp_path / "run"
    line = ["run", "--scenario", "folders", "--data.root", str(root), *fixed, *model, "--limit-iterations", "1"]
    assert main([*line, "--data.cache", "none", "--output", str(run)]) == 0
    decoded: list[Path] = []
    plain = FileImages.image
    monkeypatch.setattr(
        FileImages, "image", lambda self, index: decoded.append(self.paths[index]) or plain(self, index)
    )
    encoded: list[int] = []
    tower = evaluating.build_method

    def counted(*given):
        method = tower(*given)
        method.backbone.model.visual.register_forward_hook(lambda module, images, _: encoded.append(len(images[0])))
        return method

    monkeypatch.setattr(evaluating, "build_method", counted)
    cache = ("--data.cache", str(tmp_path / "cache"))
    assert main(["evaluate", str(run), *SPACES, *cache, "--output", str(tmp_path / "again")]) == 0
    assert len(decoded) == len(set(decoded)) == 12, decoded
    assert sum(encoded) == 3 * 12
    other = ["evaluate", str(run), "--data.root", str(files("others")), *cache, "--output", str(tmp_path / "other")]
    assert main(other) == 0
    found = read(tmp_path / "other" / "evaluation.json")
    assert (found["rows"], len(found["label_spaces"]["task"]["accuracy"][0])) == (
        ["zero-shot", "after one", "after two"],
        2,
    )
    with pytest.raises(ValueError, match=r"label_space: seen is of the tasks that the run in .* learns"):
        main([*other[:-1], str(tmp_path / "seen"), "--evaluation.label-space", "seen", "--debug"])
    with pytest.raises(
        ValueError, match=r"data\.test_fraction was 0\.2, now 0\.5: one split tests on training images of another"
    ):
        main(["evaluate", str(run), "--data.test-fraction", "0.5", "--debug"])

"""Runs that go on from an earlier run, an adapter file or an exported model: the same as if nothing had come between."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import QUICK, build, copied
from tiny_clip import build_backbone, noise_images

from cl_methods.cli import main
from cl_methods.commands.configuration import ConfigurationError, parse
from cl_methods.datasets.task import Reference, Task
from cl_methods.evaluation.boards import arrange
from cl_methods.evaluation.tables import summary_table
from cl_methods.methods import METHODS, Method
from cl_methods.scenarios.base import Scenario
from cl_methods.seeding import derive_seed
from cl_methods.training import building
from cl_methods.training import run as run_module
from cl_methods.training.checkpoints import RunDirectoryError
from cl_methods.training.export.learnt import ExportError
from cl_methods.training.progress import RunProgress

SHORT = ("--limit-iterations", "2")
SMALL = ("--method.batch-size", "8")
WITH_A_DETECTOR = ("--method.ddas.iterations", "3", "--method.ddas.generic-iterations", "3")


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """Two tasks of noise, and reference data."""
    tasks = []
    for index, names in enumerate((("ant", "bee", "cat"), ("dog", "eel"))):
        images = [noise_images(24, 10 * index + part, len(names), 70 + 110 * index) for part in range(3)]
        tasks.append(Task(f"task{index}", names, ("a photo of {}", "{} again"), *images))
    reference = Reference(noise_images(20, 99, 1, 128), ("one thing", "two", "three things", "a fourth"))
    return Scenario("mini", "I", tuple(tasks), reference)


@pytest.fixture
def run(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Method, dict[str, Any]]]:
    """``run(output, tasks, options …)``: the method and the result of a run over some of the two tasks, over the small CLIP."""

    def start(output: Path, tasks: slice, *options: str, resume: bool = False) -> tuple[Method, dict[str, Any]]:
        part = dataclasses.replace(scenario, tasks=scenario.tasks[tasks])
        monkeypatch.setattr(building, "load_scenario", lambda name, options, order: part)
        config, _ = parse(["--device", "cpu", *options], "")
        made = run_module.Run(config, output, resume=resume, overwrite=False, progress=RunProgress())
        result = made.execute()
        return made.method, result

    return start


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs over the tiny CLIP, whatever model they name."""

    def build(config, scenario, device):
        torch.manual_seed(derive_seed(config.seed, "build"))
        return METHODS[config.method](build_backbone(), config.effective_settings(), scenario.reference)

    monkeypatch.setattr(run_module, "build_method", build)


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, ...]:
    """Options for weights of the small CLIP, which files of weights and exports know."""
    torch.save({"state_dict": copied(build(QUICK)), "epoch": 1}, tmp_path / "start.pt")
    return "--model", QUICK, "--pretrained", str(tmp_path / "start.pt")


BOTH, FIRST, SECOND = slice(None), slice(0, 1), slice(1, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [("moe_adapters", WITH_A_DETECTOR), ("diki", ()), ("ewc", ()), ("ranpac", ("--method.width", "50")), ("zscl", ())],
)
def test_two_runs_are_one_sequence_to_the_bit(
    name: str, options: tuple[str, ...], scenario: Scenario, run, tiny, tmp_path: Path
) -> None:
    fixed = ("--method", name, *options, *SHORT, *SMALL)
    method, result = run(tmp_path / "whole", BOTH, *fixed)
    _, first = run(tmp_path / "first", FIRST, *fixed)
    again, second = run(tmp_path / "second", SECOND, "--weights", str(tmp_path / "first"), *SHORT)
    assert (first["accuracy"][0][0], second["zero_shot"][0]) == (result["accuracy"][0][0], result["accuracy"][0][1])
    assert second["accuracy"] == [[result["accuracy"][1][1]]]
    expected, found = method.state_dict(), again.state_dict()
    for state in (expected, found):  # features of reference images that only the whole run had to encode
        for key in [key for key in state if key.startswith("zscl.images.")]:
            del state[key]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if (
            key == "texts"
        ):  # of RanPAC: class texts of all tasks of a run are encoded in one batch, which is another one here
            torch.testing.assert_close(found[key], value)
        else:
            assert torch.equal(found[key], value), key
    assert second["started_from"]["tasks"] == [scenario.tasks[0].name]
    assert (second["tasks"], second["config"]["method"]["name"]) == ([scenario.tasks[1].name], name)


def test_an_adapter_file_goes_on_resumes_and_is_exported_with_all_its_tasks(
    scenario: Scenario, run, small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [task.name for task in scenario.tasks]
    run(tmp_path / "first", FIRST, "--method", "moe_adapters", *SHORT, *SMALL, *WITH_A_DETECTOR, *small)
    assert main(["export", str(tmp_path / "first"), "--output", str(tmp_path / "adapter")]) == 0
    assert f"clk run --weights {tmp_path / 'adapter'}" in capsys.readouterr().out
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    _, direct = run(tmp_path / "direct", SECOND, "--weights", str(tmp_path / "first"), *SHORT)
    _, result = run(tmp_path / "second", SECOND, "--weights", str(file), *SHORT)
    assert result["accuracy"] == direct["accuracy"]
    assert result["started_from"]["fingerprint"] == direct["started_from"]["fingerprint"]

    shutil.rmtree(tmp_path / "second" / "checkpoints")
    for name in ("result.json", "rows.json"):
        (tmp_path / "second" / name).unlink()
    description = json.loads((tmp_path / "second" / "run.json").read_text())
    del description["config"]["evaluation"]["only"]  # as in a run of a version that did not have it
    (tmp_path / "second" / "run.json").write_text(json.dumps(description))
    shutil.move(tmp_path / "adapter", tmp_path / "moved")  # where it lies decides nothing
    _, resumed = run(tmp_path / "second", SECOND, "--weights", str(tmp_path / "moved"), *SHORT, resume=True)
    assert resumed["accuracy"] == result["accuracy"]
    (tmp_path / "second" / "result.json").unlink()
    with pytest.raises(RunDirectoryError, match=r"began from .*adapter \(\w{12}\), now from the pre-trained model"):
        run(tmp_path / "second", SECOND, *SHORT, *SMALL, *WITH_A_DETECTOR, *small, resume=True)

    assert main(["export", str(tmp_path / "direct"), "--output", str(tmp_path / "both")]) == 0
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["tasks"] == names
    _, third = run(tmp_path / "third", FIRST, "--weights", str(tmp_path / "both"), "--evaluation.only")
    assert third["accuracy"] == [third["zero_shot"]]
    assert (third["started_from"]["tasks"], third["train"]["samples"]) == (names, 0)


def test_an_exported_model_is_the_model_of_any_method(run, small: tuple[str, ...], tmp_path: Path) -> None:
    _, result = run(tmp_path / "tuned", FIRST, "--method", "finetune", *small, *SHORT, *SMALL)
    assert main(["export", str(tmp_path / "tuned"), "--output", str(tmp_path / "model")]) == 0
    for path in (tmp_path / "model", tmp_path / "model" / "open_clip_model.safetensors"):
        config, _ = parse(["--weights", str(path), "--method", "zero_shot"], "")
        assert (config.model, config.pretrained, config.weights) == (f"local-dir:{tmp_path / 'model'}", None, None)
    _, measured = run(tmp_path / "measured", FIRST, "--weights", str(tmp_path / "model"), "--method", "zero_shot")
    assert measured["zero_shot"] == result["accuracy"][0]
    with pytest.raises(ConfigurationError, match=rf"model: .*model brings its own; leave out --model {QUICK}"):
        parse(["--weights", str(tmp_path / "model"), *small], "")


def test_methods_with_a_memory_are_measured_only(run, tiny, tmp_path: Path) -> None:
    _, result = run(tmp_path / "first", FIRST, "--method", "replay", *SHORT, *SMALL)
    with pytest.raises(ExportError, match=r"replay learns with images of earlier tasks.*--evaluation\.only"):
        run(tmp_path / "second", SECOND, "--weights", str(tmp_path / "first"))
    assert not (tmp_path / "second").exists()
    _, measured = run(tmp_path / "again", FIRST, "--weights", str(tmp_path / "first"), "--evaluation.only")
    assert measured["accuracy"] == result["accuracy"]
    boards, _ = arrange([{**one, "path": "x"} for one in (result, measured)])
    assert [board.baseline for board in boards] == ["zero-shot", "at the start"]
    assert f"going on from {tmp_path / 'first'} (" in boards[1].title
    assert [row[0] for row in summary_table(boards[1]).rows] == ["chance", "at the start"]


def test_what_cannot_be_gone_on_from(run, small: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "first", BOTH, "--method", "ranpac", "--method.width", "50", *small)
    (tmp_path / "empty").mkdir()
    (tmp_path / "SUN397.pth").touch()
    for options, error, message in (
        ((str(tmp_path / "gone"),), ExportError, r"weights: .*gone does not exist"),
        ((str(tmp_path / "empty"),), ExportError, r"empty holds neither a run nor what `clk export` writes"),
        (
            (str(tmp_path / "SUN397.pth"),),
            ExportError,
            r"SUN397\.pth is no file that `clk export` writes; .* --pretrained",
        ),
        (
            (str(tmp_path / "first"), "--method", "zscl"),
            ExportError,
            r"first is of ranpac, and the method of this run is zscl.* `clk export .*first --output DIR`",
        ),
        (
            (str(tmp_path / "first"), "--method.width", "7"),
            ExportError,
            r"first does not fit ranpac with these settings",
        ),
        ((str(tmp_path / "first"), "--model", "local-dir:x"), FileNotFoundError, r"x needs open_clip_config\.json"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path / "second", SECOND, "--weights", *options)
    assert not (tmp_path / "second").exists()

    damaged = tmp_path / "first" / "checkpoints" / "task01" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(
        ExportError, match=rf"weights: {damaged} is not what was written \(its sha256 differs\); restore it"
    ):
        run(tmp_path / "second", SECOND, "--weights", str(tmp_path / "first"))
    (tmp_path / "first" / "run.json").write_text('{"config": []}')
    with pytest.raises(ExportError, match=r"run\.json is not what `clk run` writes"):
        run(tmp_path / "second", SECOND, "--weights", str(tmp_path / "first"))


def test_the_export_of_a_damaged_checkpoint_names_the_file(
    run, small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", BOTH, "--method", "ranpac", "--method.width", "50", *small)
    for file, change in (("model.safetensors", "is not what was written"), ("state.pt", "is missing")):
        path = tmp_path / "run" / "checkpoints" / "task01" / file
        kept = path.read_bytes()
        if change == "is missing":
            path.unlink()
        else:
            path.write_bytes(bytes([*kept[:-1], kept[-1] ^ 1]))  # a readable file with another number in it
        assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"source: {path} {change}" in error
        assert "restore it from a copy, or take the state after another task (--task 1)" in error
        assert not (tmp_path / "out").exists()
        assert main(["export", str(tmp_path / "run"), "--task", "1", "--output", str(tmp_path / f"{file}-1")]) == 0
        path.write_bytes(kept)
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0

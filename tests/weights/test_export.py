"""Runs exported and loaded again: equal scores for every kind of method, and a folder that open_clip itself loads."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_clip import GELU, QUICK, build, copied, open_clip
from torch import Tensor

from cl_methods.backbone import load_backbone
from cl_methods.cli import main
from cl_methods.commands.configuration import parse
from cl_methods.datasets.images import Subset
from cl_methods.datasets.task import Reference
from cl_methods.methods import METHODS, Method
from cl_methods.scenarios import ScenarioOptions, load
from cl_methods.scenarios.base import Scenario
from cl_methods.training import building
from cl_methods.training import run as run_module
from cl_methods.training.checkpoints import RunDirectoryError
from cl_methods.training.export import load_adapter
from cl_methods.training.export.sources import _scored_by_clip_alone
from cl_methods.training.progress import RunProgress
from cl_methods.weights import moe_adapters4cl, read_weights


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """The first two tasks of ``mini``, with few images."""
    whole = load("mini", ScenarioOptions())

    def some(source: Any, count: int) -> Subset:
        return Subset(source, torch.arange(min(count, len(source))))

    tasks = tuple(
        dataclasses.replace(t, train=some(t.train, 48), validation=some(t.validation, 8), test=some(t.test, 24))
        for t in whole.tasks[:2]
    )
    reference = Reference(some(whole.reference.images, 32), whole.reference.captions[:32])
    return dataclasses.replace(whole, tasks=tasks, reference=reference)


@pytest.fixture
def learnt(scenario: Scenario, monkeypatch: pytest.MonkeyPatch):
    """``learnt(output, method, options …)``: the method after a short run over the two tasks, as ``clk run`` makes it."""
    monkeypatch.setattr(building, "load_scenario", lambda name, options, order: scenario)

    def start(output: Path, method: str, *options: str, resume: bool = False) -> Method:
        arguments = ["--method", method, "--device", "cpu", *options]
        if method not in ("ranpac", "zero_shot"):
            arguments += ["--limit-iterations", "2"]
        if method == "moe_adapters":
            arguments += ["--method.ddas.iterations", "3", "--method.ddas.generic-iterations", "3"]
        config, _ = parse(arguments, "")
        run = run_module.Run(config, output, resume=resume, overwrite=False, progress=RunProgress())
        run.execute()
        run.method.before_evaluation()
        return run.method

    return start


def scores(method: Method, scenario: Scenario) -> list[Tensor]:
    method.before_evaluation()
    method.expect(scenario.tasks)  # as a run does: the prompts of all tasks are encoded in one batch
    found = []
    for task in scenario.tasks:
        images = torch.stack([method.backbone.eval_transform(task.test.image(i)) for i in range(len(task.test))])
        found.append(method.logits(images, task))
    return found


def zero_shot(backbone: Any) -> Method:
    return METHODS["zero_shot"](backbone, METHODS["zero_shot"].default_config("mini"))


@pytest.mark.parametrize("name", ["zscl", "wise_ft", "moe_adapters", "diki", "ranpac", "proof", "clap4clip"])
def test_a_run_on_mini_comes_back_with_equal_scores(
    name: str, learnt, scenario: Scenario, tmp_path: Path, capsys
) -> None:
    method = learnt(tmp_path / "run", name)
    expected = scores(method, scenario)
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(f"{tmp_path / 'out' / file}  " in text for file in written)
    if name in ("zscl", "wise_ft"):
        assert written == {"mini_model.safetensors"}
        again = zero_shot(load_backbone(f"local-dir:{tmp_path / 'out'}"))
        assert f"--model local-dir:{tmp_path / 'out'}" in text
    else:
        assert written == {"adapter_model.safetensors", "adapter_config.json"}
        again = load_adapter(tmp_path / "out")
        assert type(again) is METHODS[name]
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["tasks"] == [
            t.name for t in scenario.tasks
        ]
    # PROOF encodes the prompts of all classes again, in one batch instead of task by task, and rounds otherwise.
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if name == "proof" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(scores(again, scenario), expected, **tolerance)
    untouched = scores(zero_shot(load_backbone("mini")), scenario)
    assert not all(torch.equal(one, other) for one, other in zip(untouched, expected, strict=True))


@pytest.fixture
def start_weights(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    state = copied(build(QUICK))
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "start.pt")
    return tmp_path / "start.pt", state


def test_open_clip_loads_what_was_fine_tuned(
    learnt, scenario: Scenario, start_weights: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, state = start_weights
    options = ("--model", QUICK, "--pretrained", str(path))
    method = learnt(tmp_path / "run", "zscl", *options)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["weights"]["source"] == str(path)
    assert result["weights"]["fingerprint"] == load_backbone(QUICK, str(path)).origin.fingerprint
    assert len(result["weights"]["sha256"]) == 64
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    network.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a photo of a cat", "two"])
    images = torch.randn(3, 3, 16, 16)
    trained = method.backbone.model
    assert not torch.equal(trained.visual.proj, state["visual.proj"])
    with torch.no_grad():
        assert torch.equal(network.encode_image(images), trained.encode_image(images))
        assert torch.equal(network.encode_text(tokens), trained.encode_text(tokens))
    original = open_clip.create_model_and_transforms(QUICK)[2]
    assert [str(step) for step in preprocess.transforms[:2]] == [str(step) for step in original.transforms[:2]]
    for one, other in zip(
        scores(zero_shot(load_backbone(f"local-dir:{tmp_path / 'out'}")), scenario),
        scores(method, scenario),
        strict=True,
    ):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=rf"trained with QuickGELU \(its header says so\), but {GELU} uses GELU"):
        load_backbone(GELU, str(tmp_path / "out" / "open_clip_model.safetensors"))

    torch.save({"state_dict": {**state, "logit_scale": torch.tensor(1.0)}, "epoch": 1}, path)
    with pytest.raises(RunDirectoryError, match=f"the weights of {QUICK} have changed since the run"):
        learnt(tmp_path / "run", "zscl", *options, resume=True)
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "late")]) == 2
    assert not (tmp_path / "late").exists()


def test_moe_adapters_for_the_public_code(
    learnt, scenario: Scenario, start_weights: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, state = start_weights
    wide = ("--method.experts", "3", "--method.bottleneck", "64", "--method.scale", "0.5")
    method = learnt(tmp_path / "run", "moe_adapters", "--model", QUICK, "--pretrained", str(path), *wide)
    arguments = ["export", str(tmp_path / "run"), "--layout", "moe-adapters4cl", "--output"]
    with pytest.warns(
        UserWarning, match="detector reads features of the backbone; the public code knows AlexNet's only"
    ):
        assert main([*arguments, str(tmp_path / "out")]) == 0
    last = scenario.tasks[-1].name
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"{last}.pth", "frozen.txt"}
    lines = (tmp_path / "out" / "frozen.txt").read_text().splitlines()
    found = moe_adapters4cl.from_public(read_weights(tmp_path / "out" / f"{last}.pth").state, lines)
    assert found.tasks == 2
    for name, value in found.clip.items():
        assert torch.equal(value, state[name]), name
    for name, value in method.adapters.state_dict().items():
        if "usage" not in name:
            expected = 5 * value if ".up_" in name else value  # their scale is fixed at 0.1
            torch.testing.assert_close(found.adapters[name], expected, rtol=1e-6, atol=0)
    learnt(tmp_path / "zero", "ranpac")
    with pytest.raises(ValueError, match="moe-adapters4cl is the form of moe_adapters"):
        main(["export", "--debug", str(tmp_path / "zero"), *arguments[2:], str(tmp_path / "no")])


def test_what_the_public_code_cannot_run_is_refused(learnt, tmp_path: Path, capsys) -> None:
    learnt(tmp_path / "run", "moe_adapters")
    arguments = ["export", str(tmp_path / "run"), "--layout", "moe-adapters4cl", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    for part in ("computes QuickGELU, mini uses GELU", "its heads are 64 wide, those of the text tower [32]"):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_zscl_checkpoints_become_folders_and_earlier_tasks_can_be_had(
    learnt, start_weights: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys
) -> None:
    state = start_weights[1]
    torch.save({"state_dict": state}, tmp_path / "SUN397.pth")  # what ZSCL's fine-tuning saves
    assert main(["export", str(tmp_path / "SUN397.pth"), "--model", QUICK, "--output", str(tmp_path / "zscl")]) == 0
    network = open_clip.create_model(f"local-dir:{tmp_path / 'zscl'}")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    learnt(tmp_path / "run", "ranpac")
    assert (
        main(["export", str(tmp_path / "run"), "--task", "1", "--with-model", "--output", str(tmp_path / "first")]) == 0
    )
    method = load_adapter(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert len(config["tasks"]) == 1
    assert method.backbone.origin.fingerprint == config["base_fingerprint"]
    assert (tmp_path / "first" / "mini_model.safetensors").is_file()
    capsys.readouterr()

    run, out = str(tmp_path / "run"), ["--output", str(tmp_path / "x")]
    for arguments, message in (
        ([run, "--task", "3", *out], "has checkpoints after tasks 1, 2, not after 3"),
        ([run, "--model", QUICK, *out], "model: has no meaning for a run or an adapter file"),
        ([run, "--output", str(tmp_path / "first")], "already exists and is not empty"),
        ([str(tmp_path / "nowhere"), *out], "does not exist"),
        ([str(tmp_path / "SUN397.pth"), "--model", QUICK, "--frozen", "gone", *out], "frozen: gone does not exist"),
        ([str(tmp_path / "zscl"), *out], "holds no run (no run.json)"),
        ([str(tmp_path / "SUN397.pth"), *out], "a file of weights does not name its architecture"),
        ([str(tmp_path / "SUN397.pth"), "--model", QUICK, "--task", "1", *out], "task: has no meaning for a file"),
        (
            [str(tmp_path / "SUN397.pth"), "--model", QUICK, "--detector", run, *out],
            "holds no adapters of MoE-Adapters",
        ),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_scores_with_more_than_its_clip_is_never_exported_as_a_bare_model() -> None:
    alone = {name for name, method in METHODS.items() if _scored_by_clip_alone(method)}
    assert {"zero_shot", "finetune", "zscl", "wise_ft", "lwf", "ewc"} <= alone
    assert not alone & {"moe_adapters", "diki", "ranpac", "loranpac", "proof", "clap4clip", "icarl"}


@pytest.mark.parametrize("package", ["commands", "training", "weights", "evaluation"])
def test_what_a_command_loads_first_prepares_torchvision_before_open_clip(package: str) -> None:
    """Otherwise a command fails in a process of its own where torchvision's operators do not load."""
    for path in sorted((Path(run_module.__file__).parents[1] / package).glob("*.py")):
        prepared = False
        for node in ast.parse(path.read_text()).body:
            prepared |= isinstance(node, ast.Expr) and ast.unparse(node) == "prepare_torchvision()"
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert prepared or not any(name.partition(".")[0] == "open_clip" for name in named), path

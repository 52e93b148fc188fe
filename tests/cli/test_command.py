"""The command as a user types it: verbs, exit codes, one-line errors, and one short real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cl_methods.cli import COMMANDS, SPINS, main


def clk(
    *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cl_methods.cli", *map(str, arguments)]
    root = Path(__file__).parents[2]
    environment = {**environment, "PYTHONPATH": f"{root}:{root / 'python'}"}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["unset", "spins", "policy"],
)
def test_waiting_threads_soon_leave_the_processor_to_others(given, spins):
    """What OpenMP says that it does, unless the user chose."""
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = clk("doctor", environment={**own, **given, "OMP_DISPLAY_ENV": "verbose"})
    assert done.returncode == 0
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_usage_lists_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in COMMANDS)


def test_unknown_verbs_get_a_suggestion(capsys):
    assert main(["comprae"]) == 2
    assert capsys.readouterr().err.startswith("clk: error: no command 'comprae'; did you mean `clk compare`?")


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help(verb, capsys):
    try:
        status = main([verb, "--help"])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0
    assert f"clk {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "zsl"], "did you mean zscl?"),
        (["run", "--scenario", "folders"], "data.root: scenario folders needs"),
        (["run", "--order", "III"], "scenario mini has the orders I and II, got 'III'"),
        (["run", "--device", "cuda:99"], "device: cuda:99"),
        (["run", "--method", "finetune,zsl"], "did you mean zscl?"),
        (["run", "--method", "finetune,finetune"], "method: expected different names separated by commas"),
        (["run", "--seed", "0,,1"], "seed: expected different names separated by commas, got '0,,1'"),
        (["run", "--method", "finetune,zscl", "--method.lr", "1e-3"], "--method.lr: expected with one method only"),
        (["compare", "nowhere"], "nowhere is not a directory"),
        (["doctor", "all"], "expected no arguments"),
    ],
)
def test_errors_are_one_line_with_status_two(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_debug_shows_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="zsl"):
        main(["run", "--debug", "--method", "zsl"])


def test_doctor_and_methods_tell_what_there_is(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("torch", "moe_adapter", "feature_distill_kl", "average_", "reference"))
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("zero_shot", "moe_adapters", "mini", "folders"))


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dry-run", "--method", "finetune", "--limit-iterations", "3"]) == 0
    text = capsys.readouterr().out
    assert "7 x 4 optimiser steps" in text
    assert "evaluation: 8 rows of 6,797 images; 54,376 image encodings, class texts encoded 8 times" in text
    assert "training: 132 GFLOP, one step of every task counted on tensors without data" in text
    assert "disk: checkpoints 15.5 MiB at the end, up to 6.64 MiB more inside a task" in text
    assert "would write to runs/mini-finetune-seed0; nothing has been written" in text
    assert not list(tmp_path.iterdir())


def test_a_short_run_on_mini_with_plain_progress_and_report(tmp_path, capsys):
    short = ["--limit-tasks", "2", "--limit-iterations", "2", "--evaluation.limit", "40"]
    finished = clk("run", "--method", "finetune", *short, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    output = tmp_path / "runs" / "mini-finetune-seed0"
    assert {path.name for path in output.iterdir()} == {
        "run.json", "config.yaml", "rows.json", "result.json", "checkpoints", "report.md", "accuracy.png", "matrix.png",
    }  # fmt: skip
    result = json.loads((output / "result.json").read_text())
    assert result["train"]["samples"] == 2 * 3 * 64
    for words in ("finetune on mini: 2 tasks, 3 optimiser steps each", "samples/s", "left", "zero-shot:", "Transfer"):
        assert words in finished.stdout
    assert main(["run", "--method", "finetune", *short, "--output", str(output)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["compare", str(output), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_series_gives_what_its_runs_give_alone_and_compares_them(tmp_path, capsys):
    short = ["--limit-tasks", "2", "--limit-iterations", "1", "--evaluation.limit", "40", "--output"]
    series = tmp_path / "all"
    assert main(["run", "--method", "finetune,moe_adapters", "--seed=0,1", *short, str(series)]) == 0
    names = ["finetune-I-0", "finetune-I-1", "moe_adapters-I-0", "moe_adapters-I-1"]
    assert sorted(path.name for path in series.iterdir()) == ["compare", *names]
    assert "| finetune | 2 |" in (series / "compare" / "table.md").read_text()
    assert main(["run", "--method", "moe_adapters", "--seed", "1", *short, str(tmp_path / "alone")]) == 0
    alone, inside = (
        json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "alone", series / names[-1])
    )
    assert alone["accuracy"] == inside["accuracy"]
    before = (series / names[0] / "result.json").read_bytes()
    capsys.readouterr()
    assert main(["run", "--method", "zero_shot,finetune", "--seed", "0", *short, str(series)]) == 2
    assert "finetune-I-0 already holds a run" in capsys.readouterr().err
    assert not (series / "zero_shot-I-0").exists()
    assert (series / names[0] / "result.json").read_bytes() == before

"""Which levers go with which: the table in docs/memory.md, held against the configuration and, slowly, against runs of pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest

from cl_methods.commands.configuration import parse

ROOT = Path(__file__).parents[2]
HEADING = "## What goes with what"
OPTIONS = {
    "budget": "--memory-budget BUDGET",
    "bf16": "--precision bf16",
    "8bit": "--optimizer-state 8bit",
    "host": "--optimizer-state host",
    "averages": "--offload averages",
    "anchors": "--offload anchors",
    "compile": "--compile blocks",
    "fsdp": "--distributed fsdp",
    "processes": "",
}
ROUNDING = {"bf16": 0.02, "8bit": 0.02}


def table() -> dict[frozenset[str], str]:
    """``yes`` or ``no`` for every pair of columns of the documented table."""
    text = (ROOT / "docs" / "memory.md").read_text().partition(HEADING)[2]
    lines = [line for line in text.splitlines() if line.startswith("|")][: len(OPTIONS) + 2]
    head, _, *rows = ([cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines)
    names = [next(name for name in OPTIONS if name in cell) for cell in head[1:]]
    found: dict[frozenset[str], str] = {}
    for name, (_, *cells) in zip(names, rows, strict=True):
        for other, cell in zip(names, cells, strict=True):
            if name != other and cell != "one of the two":
                assert found.setdefault(frozenset((name, other)), cell) == cell, "the table is not symmetric"
    assert len(found) == len(list(combinations(OPTIONS, 2))) - 1  # both states of the optimiser are one option
    return found


def together(names: Iterable[str]) -> str:
    """The options of all, as on the command line: what goes to the host is one of them."""
    options = " ".join(OPTIONS[name] for name in names if OPTIONS[name])
    return "--offload all" if {"averages", "anchors"} == set(names) else options


def test_every_pair_is_taken_or_refused_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_methods.training.memory.optimizer_state.find_spec", lambda name: object())  # torchao
    for pair, verdict in table().items():
        options = together(pair).replace("BUDGET", "4GiB").split()
        arguments = ["--method", "weight_ensemble", *options]
        if verdict == "yes":
            parse(arguments, "")
        else:
            with pytest.raises(
                ValueError, match=r"(memory_budget|compile|optimizer_state|offload): .*got .*(expected|leave one)"
            ):
                parse(arguments, "")


def losses(folder: Path, count: int, every: list[str]) -> dict[str, dict]:
    program = Path(__file__).with_name("lever_runs.py")
    paths = os.pathsep.join([*map(str, (ROOT, ROOT / "python", program.parent)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, program, folder, str(count), *every]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.torchao
def test_runs_under_every_pair_have_the_losses_of_a_run_under_none(tmp_path: Path) -> None:
    """Two processes where the pair names them or shards; what a resumed run may change, it goes on under."""
    names = {pair: sorted(pair, key=list(OPTIONS).index) for pair, verdict in table().items() if verdict == "yes"}
    options = {pair: together(every) for pair, every in names.items()}
    shared = [pair for pair in names if pair & {"fsdp", "processes"}]
    alone = [pair for pair in names if pair not in shared]
    resumed = [f"resume {OPTIONS[name]}" for name in OPTIONS if name not in (*ROUNDING, "fsdp", "processes")]
    one = losses(tmp_path / "1", 1, ["", *(options[pair] for pair in alone), *resumed])
    two = losses(tmp_path / "2", 2, [options[pair] for pair in shared])
    plain = one[""]["losses"]
    assert len(plain) == 3
    for found, pairs in ((one, alone), (two, shared)):
        for pair in pairs:
            near = max([ROUNDING.get(name, 1e-5) for name in pair])
            assert found[options[pair]]["losses"] == pytest.approx(plain, rel=near), pair
    for text in resumed:
        assert one[text]["losses"] == pytest.approx(plain, rel=1e-5), text
    for text, found in (one | two).items():
        assert (found["parts"] is not None) == ("--memory-budget" in text), text

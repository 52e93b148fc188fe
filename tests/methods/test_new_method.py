"""The method that ``docs/new_method.md`` writes, and what is said to someone whose class does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_clip import build_backbone
from trained import SHORT, check_resuming

from cl_kernels.profile import HostWaits
from cl_methods.cli import main
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.find import find_method

PAGE = Path(__file__).parents[2] / "docs" / "new_method.md"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The page's code as a file."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 60
    (tmp_path / "text_residual.py").write_text(code, encoding="utf-8")
    return tmp_path / "text_residual.py"


def test_the_method_of_the_page_learns_resumes_and_never_waits(file: Path, tasks: list[Task], batches) -> None:
    method_type = find_method(f"{file}:TextResidual")
    assert find_method(f"{file}:TextResidual") is method_type
    check_resuming(lambda: method_type(build_backbone(), method_type.Config(**SHORT)), tasks, batches)
    method = method_type(build_backbone(), method_type.Config())
    method.before_task(0, tasks[0])
    batch: Batch = batches(0, 1)[0]
    first = method.loss(batch)["loss"]
    with HostWaits([*method.backbone.model.parameters(), batch.images, batch.labels]) as waits:
        method.loss(batch)["loss"].backward()
    assert waits.by_name == {}
    for _ in range(20):
        (residual,) = (value for _, value in method.trainable())
        residual.grad = None
        method.loss(batch)["loss"].backward()
        residual.data -= 0.1 * residual.grad
    assert method.loss(batch)["loss"] < first


def test_the_command_runs_it(file: Path, tmp_path: Path) -> None:
    short = ["--limit-tasks", "2", "--limit-iterations", "2", "--evaluation.split", "validation"]
    output = tmp_path / "run"
    own = ["--method", f"{file}:TextResidual", "--method.scale", "0.7"]
    assert main(["run", *own, *short, "--output", str(output)]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["method"] == "text_residual"
    assert result["config"]["method"]["scale"] == 0.7


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "has no class 'Mine'"),
        ("Mine = 3", "is no subclass of cl_methods.methods.Method"),
        (
            "from cl_methods.methods import Method\nclass Mine(Method):\n    name = 'mine'",
            "lacks facts, Config, loss, trainable",
        ),
        (
            "from cl_methods.methods import FineTune\nclass Mine(FineTune):\n    pass",
            "has the name 'finetune' of another method",
        ),
    ],
)
def test_a_class_that_does_not_fit_is_told_why(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        find_method(f"{tmp_path / 'mine.py'}:Mine")


def test_names_that_lead_nowhere() -> None:
    assert find_method("zscl") is METHODS["zscl"]
    assert find_method("cl_methods.methods.zscl:ZSCL") is METHODS["zscl"]
    for name, message in (
        ("zcsl", r"expected one of .*, got 'zcsl'; did you mean zscl\?"),
        ("no_such_package_here:Method", "cannot import 'no_such_package_here'"),
        ("nowhere.py:Method", r"nowhere\.py does not exist"),
        ("qqq", r"one of your own is MODULE:CLASS or PATH\.py:CLASS"),
    ):
        with pytest.raises(ValueError, match=message):
            find_method(name)

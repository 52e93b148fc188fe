"""Runs that lie where nothing may be written: a complete one is shown, any other is left as it is, with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from privileges import read_only

from cl_methods.cli import main

SHORT = ["--method", "finetune", "--limit-tasks", "1", "--limit-iterations", "1", "--method.batch-size", "4"]
SHORT += ["--evaluation.limit", "8", "--device", "cpu"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return " ".join(f"{out} {err}".split())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_complete_run_is_shown_and_any_other_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cl_methods.evaluation.figures.png", lambda figure: b"picture"
    )  # which takes longer than the run
    run = tmp_path / "run"
    again = ["run", *SHORT, "--output", str(run), "--resume"]
    assert main(again) == 0
    capsys.readouterr()
    before = content(run)
    with read_only(run):
        with pytest.raises(PermissionError):
            (run / "anything").touch()
        assert main(again) == 0
        shown = said(capsys)
        assert f"{run} is complete; nothing left to do" in shown
        assert f"{run} may only be read: nothing in it has been written" in shown
        assert f"{json.loads((run / 'result.json').read_text())['zero_shot'][0]:.1f}" in shown
        assert main([*again[:-1], "--overwrite"]) == 2
        assert "run.lock cannot be written (Permission denied); make the folder writable" in said(capsys)
    assert content(run) == before
    (run / "result.json").unlink()
    with read_only(run):
        assert main(again) == 2
        assert "run.lock cannot be written (Permission denied); make the folder writable" in said(capsys)

"""What a run tells while it works, on a terminal and elsewhere, and stopping it with Ctrl-C."""

from __future__ import annotations

import errno
import io
import os
import re
import signal

import pytest
from fakes import ClosedFormMethod
from rich.console import Console

from cl_methods.training import run as run_module
from cl_methods.training.progress import Pace, PlainProgress, RichProgress, RunProgress, format_seconds
from cl_methods.training.signals import StopOnSignal


def test_plain_lines(tiny_run, tmp_path):
    stream = io.StringIO()
    tiny_run(tmp_path / "run", progress=PlainProgress(stream, interval=0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tiny on tiny: 3 tasks, 7 optimiser steps each"
    assert re.match(r"zero-shot: [\d.]+ [\d.]+ [\d.]+ \(mean [\d.]+\)", lines[1])
    pattern = r"task 1/3 task0: step 1/7, loss [\d.]+ \(ce [\d.]+\), \d+ samples/s, \d\d:\d\d left"
    assert re.match(pattern, lines[2])
    assert sum("step" in line for line in lines[2:]) == 21
    assert lines[-1].startswith("after task2: ")


def test_plain_lines_of_a_method_in_closed_form(tiny_run, tmp_path):
    stream = io.StringIO()
    tiny_run(tmp_path / "run", method=ClosedFormMethod, progress=PlainProgress(stream, interval=0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tiny_closed_form on tiny: 3 tasks, one pass over each task's images"
    assert re.match(r"task 1/3 task0: step 1/3, \d+ samples/s, \d\d:\d\d left", lines[2])
    assert sum("step" in line for line in lines) == 9


def test_bars_on_a_terminal(tiny_run, tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    tiny_run(tmp_path / "run", progress=RichProgress(console))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "whole run" in text
    assert "task 3/3 task2" in text
    assert "samples/s" in text
    assert "after task2" in text


def test_pace_knows_what_is_left():
    pace = Pace(steps=[10, 10])
    assert pace.seconds_left() is None
    pace.row(3.0)
    for _ in range(5):
        pace.step(64, 0.5)
    assert pace.samples_per_second == 128
    assert pace.seconds_left(4) == 2.0
    assert pace.seconds_left() == 15 * 0.5 + 2 * 3.0
    pace.skip(10, 1)
    assert pace.seconds_left() == 5 * 0.5 + 3.0
    assert [format_seconds(value) for value in (None, 62.4, 3723)] == ["--:--", "01:02", "1:02:03"]


@pytest.fixture
def ctrl_c_arrives():
    """A process that a shell started in the background ignores Ctrl-C, and so would the tests in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_arrives")
def test_ctrl_c_writes_a_checkpoint_and_the_run_can_be_resumed(tiny_run, tmp_path, monkeypatch):
    whole = tiny_run(tmp_path / "whole")
    original = run_module.Run.execute

    def execute(run):
        with StopOnSignal(run):
            return original(run)

    class Interrupt(RunProgress):
        def step(self, report):
            super().step(report)
            if report.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_module.Run, "execute", execute)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(run_module.StoppedError, match="stopped after step 5 of task task0; continue with --resume"):
        tiny_run(tmp_path / "run", progress=Interrupt())
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["task00-step000005"]
    assert tiny_run(tmp_path / "run", resume=True)["accuracy"] == whole["accuracy"]


def test_a_log_that_cannot_be_written_for_a_while_does_not_end_the_run():
    class Disk(io.StringIO):
        full = False

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    progress = PlainProgress(disk)
    progress.note("first")
    disk.full = True
    progress.note("second")
    progress.note("third")
    disk.full = False
    progress.note("fourth")
    progress.note("fifth")
    lines = disk.getvalue().splitlines()
    assert lines[0] == "first"
    assert lines[1].startswith("(2 lines before this one came late, or not at all")
    assert lines[2:] == ["fourth", "fifth"]

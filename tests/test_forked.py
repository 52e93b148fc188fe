"""Programs of the fork server are processes like any other."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forkserver

PROGRAM = """
import atexit, os, signal, sys, time
atexit.register(print, "left")
print(__name__, sys.argv[1:], os.environ.get("ASKED"), os.getcwd(), sys.stdin.read() == "")
print("wrong", file=sys.stderr)
how = sys.argv[1]
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "sleep":
    child = os.fork()
    if child:
        open(sys.argv[2], "w").write(str(child))
    time.sleep(600)
sys.exit(int(how) if how.isdigit() else how)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Forkserver]:
    started = Forkserver(["decimal"])
    yield started
    started.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize(
    ("how", "status", "said", "last"),
    [("0", 0, "", "left\n"), ("3", 3, "", "left\n"), ("a sentence", 1, "a sentence\n", "left\n")],
)
def test_as_a_process_that_ends(how, status, said, last, server, program, tmp_path):
    done = server.run(program, how, 7, environment={"ASKED": "yes"}, folder=tmp_path)
    expected = f"__main__ {[how, '7']} yes {tmp_path} True\n{last}"
    assert (done.returncode, done.stdout, done.stderr) == (status, expected, f"wrong\n{said}")
    assert "ASKED" not in os.environ


def test_a_death_is_told_and_the_next_program_knows_nothing_of_it(server, program):
    assert server.run(program, "kill", environment={"ASKED": "yes"}).returncode == -9
    done = server.run(program, "0")
    assert done.returncode == 0
    assert "None" in done.stdout


def lives(process: Path) -> bool:
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended before, or while it was read
        return False


def test_what_takes_too_long_is_killed_with_its_children(server, program, tmp_path):
    written = tmp_path / "child"
    for timeout in (1.0, 10.0, 60.0):  # a busy machine needs longer to get so far
        with pytest.raises(subprocess.TimeoutExpired):
            server.run(program, "sleep", written, timeout=timeout)
        if written.exists() and written.read_text():
            break
    child, deadline = Path("/proc") / written.read_text(), time.monotonic() + 60
    while lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.run(program, "0").returncode == 0


def test_a_server_that_cannot_import_says_so(capfd, program):
    broken = Forkserver(["nowhere_to_be_found"])
    with pytest.raises(RuntimeError, match="the process that imports nowhere_to_be_found is gone"):
        broken.run(program, "0")
    broken.close()
    assert "No module named 'nowhere_to_be_found'" in capfd.readouterr().err

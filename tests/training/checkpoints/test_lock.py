"""One process at a time in a run directory: who is refused, with which words, and what is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cl_methods.training.checkpoints import RunDirectory, RunDirectoryError
from cl_methods.training.checkpoints.lock import LOCK, RunLock


def start_holder(path: Path) -> tuple[int, int]:
    """Fork a process that takes the lock and then forks a child of its own, as processes that read images are; ids of both."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            RunLock(path).take()
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(writing)
    child = int(os.read(reading, 20))
    os.close(reading)
    return holder, child


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock, and the child that it has forked since."""
    holder, child = start_holder(tmp_path / LOCK)
    yield holder
    os.kill(child, signal.SIGKILL)
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_a_second_process_is_refused_and_told_of_the_first_until_that_is_dead(other, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match=rf"output: {tmp_path} is in use by process {other} on .*--resume"):
            RunDirectory(tmp_path).prepare(resume=True)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)  # its child lives on
    directory = RunDirectory(tmp_path)
    assert directory.prepare(resume=True)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    directory.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_a_directory_with_nothing_but_a_stale_lock_is_empty(tmp_path):
    (tmp_path / LOCK).write_text("half a li")
    directory = RunDirectory(tmp_path)
    assert not directory.prepare()
    directory.release()
    assert not list(tmp_path.iterdir())


def test_a_refused_directory_is_left_unlocked(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory(tmp_path).prepare()
    assert not (tmp_path / LOCK).exists()


def test_the_file_that_a_holder_has_just_removed_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between opening and locking, the last holder removes the file: a third process would lock another one."""
    lock, lockf, calls = RunLock(tmp_path / LOCK), fcntl.lockf, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(lockf(descriptor, how))

    monkeypatch.setattr(fcntl, "lockf", late)
    lock.take()
    assert len(calls) == 2
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("change", "refused"),
    [({}, True), ({"started": "1"}, False), ({"pid": 2**22 + 1}, False), ({"host": "elsewhere"}, True)],
    ids=["alive", "number of a later process", "gone", "another machine"],
)
def test_without_locks_the_file_decides(change, refused, other, tmp_path, monkeypatch):
    def unknown(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unknown)
    path = tmp_path / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if refused:
        with pytest.raises(RunDirectoryError, match=r"knows no locks: if that process is gone, delete .*run\.lock"):
            RunLock(path).take()
    else:
        RunLock(path).take()
        assert json.loads(path.read_text())["pid"] == os.getpid()

"""A process that reads images obeys its parent alone, and holds nothing open that the parent has closed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from cl_methods import ranks
from cl_methods.datasets.workers import leave_to_the_parent


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked(work: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        work()
    finally:
        os._exit(1)


@pytest.fixture
def worker() -> Iterator[tuple[int, Callable[[], bytes]]]:
    """A child that has left all that it should to this process; its id, and what asks it for a sign of life."""
    (asked, ask), (answer, answered) = os.pipe(), os.pipe()

    def work() -> None:
        leave_to_the_parent(0)
        while True:
            os.write(answered, os.read(asked, 1))

    def alive() -> bytes:
        os.write(ask, b"x")
        return os.read(answer, 1)

    process = forked(work)
    assert alive() == b"x"
    yield process, alive
    for end in (asked, ask, answer, answered):
        os.close(end)


def test_only_its_parent_ends_it(worker):
    """Batch systems signal every process of a job; Python ends its children so when it ends itself, and waits for them."""
    process, alive = worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        wait(forked(lambda number=number: os.kill(process, number)))
        assert alive() == b"x"
    os.kill(process, signal.SIGTERM)
    assert wait(process) == 0


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    far.settimeout(60)
    with near, far:
        yield near, far


@pytest.mark.usefixtures("several")
def test_connections_of_a_run_end_with_the_parents(connection, worker):
    """What listens at the other end hears at once that the parent has hung up."""
    (near, far), (process, alive) = connection, worker
    near.close()
    assert far.recv(1) == b""
    assert alive() == b"x"
    os.kill(process, signal.SIGTERM)
    assert wait(process) == 0


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "joined_count", lambda: 2)

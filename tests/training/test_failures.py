"""What is said when training cannot go on is said once."""

from __future__ import annotations

import os
import signal

import pytest

from cl_methods.training.failures import hear_no_more_of

DEATH = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed.")


def test_a_dead_worker_is_not_reported_again_while_its_death_is_explained() -> None:
    """torch's handler raises wherever the main thread is, for every child that ends, stops or goes on."""

    def report(*_: object) -> None:
        raise DEATH

    before = signal.signal(signal.SIGCHLD, report)
    try:
        hear_no_more_of(RuntimeError("something else"))
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            os.kill(os.getpid(), signal.SIGCHLD)
        hear_no_more_of(DEATH)
        os.kill(os.getpid(), signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)

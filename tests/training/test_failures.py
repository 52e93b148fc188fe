"""What is said when training cannot go on is said once, and not taken for something else."""

from __future__ import annotations

import os
import resource
import signal

import pytest
import torch

from cl_methods import ranks
from cl_methods.training.checkpoints import RunDirectory, TrainingProgress
from cl_methods.training.checkpoints.atomic import WriteError, writing
from cl_methods.training.failures import WorkerDiedError, explain, hear_no_more_of

DEATH = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed.")
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1125899906842624 bytes.")


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


@pytest.mark.parametrize("error", [DEATH, NO_MEMORY], ids=["worker", "memory"])
def test_what_interrupts_a_write_or_an_exchange_is_not_its_failure(error, tmp_path) -> None:
    with pytest.raises(RuntimeError) as raised, writing(tmp_path / "file"):
        raise error
    assert raised.value is error
    with pytest.raises(WriteError, match="file cannot be written"), writing(tmp_path / "file"):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError) as raised, ranks.exchange():
        raise DEATH
    assert raised.value is DEATH
    with pytest.raises(ranks.OtherRankError, match=r"broke off \(Read error: reset by peer\)"), ranks.exchange():
        raise RuntimeError("[/gloo/pair.cc:537] Read error: reset by peer. This is typically caused by a bug.")


def test_an_error_in_a_worker_is_no_death(tmp_path) -> None:
    """torch hands it on with a traceback of that process, of which the last line says what is wrong."""
    directory = RunDirectory(tmp_path)
    said = "Caught RuntimeError in DataLoader worker process 1.\nOriginal Traceback …:\n  File …\nRuntimeError: of a transform\n"
    explained = explain(RuntimeError(said), directory)
    assert not isinstance(explained, WorkerDiedError)
    assert str(explained).startswith(
        "RuntimeError: of a transform (in DataLoader worker process 1, which reads images;"
    )
    assert isinstance(explain(DEATH, directory), WorkerDiedError)


def test_the_systems_own_reason_is_said_of_either_file_of_a_checkpoint(tmp_path) -> None:
    """torch says of a full disk that a position was unexpected."""
    directory, large, small = RunDirectory(tmp_path), torch.zeros(50_000), torch.zeros(5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for model, optimizer in ((small, large), (large, small)):
            with pytest.raises(WriteError, match=r"task00 cannot be written \(.*File too large.*\); make room"):
                directory.save(0, None, {"weight": model}, {"state": optimizer}, TrainingProgress())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    directory.save(0, None, {"weight": large}, {"state": large}, TrainingProgress())
    assert torch.equal(directory.found()[0].training_state()[0]["state"], large)

"""Joining the processes that ``torchrun`` has started, and how all of them end when one does."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cl_methods import ranks

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another: while the first one writes a checkpoint, or reads an archive for the first time."""
_FAILED, _PARTED = "first failure", "parted"
_SECONDS_FOR_LAST_WORDS = 5


@contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes of ``torchrun`` compute together (:mod:`cl_methods.ranks`); one that was started alone stays alone.

    An error in one process ends all: exchanges with a process that is gone fail, and whoever fails first leaves its sentence in
    the store of the group. That process raises its error; the others exit with status 2 and say nothing.

    Raises:
        OtherRankError: a process is gone without a word; raised in one of those that are left.
        ValueError: the environment lacks what ``torchrun`` sets.
    """
    world = _number("WORLD_SIZE", "1")
    if world == 1 or ranks.joined_count() > 1:
        yield
        return
    number, local = _number("RANK"), _number("LOCAL_RANK", "0")
    with_gpus = torch.cuda.is_available()
    if with_gpus:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK: process {local} of this machine needs a GPU of its own, there are {torch.cuda.device_count()}; "
                "start fewer processes, or hide the GPUs (CUDA_VISIBLE_DEVICES=) and take --device cpu"
            )
        torch.cuda.set_device(local)
    store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    own = dist.PrefixStore("cl_methods", store)
    _load_what_would_keep_the_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if with_gpus else "gloo", store=own, rank=number, world_size=world, timeout=PATIENCE
    )
    ranks.joined(True)
    try:
        with warnings.catch_warnings():
            if number:
                warnings.simplefilter("ignore")  # the first process says it
            yield
        ranks.everyone(True)  # nobody leaves while others still exchange
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001  # of every kind the others have to know
        failures = dist.PrefixStore("failures", own)
        with _undisturbed():
            try:
                if isinstance(error, Exception):
                    _fail(failures, number, error)
                # Ctrl-C, or an exit whose reason has been said.
                _claim(failures, f"rank {number}: {type(error).__name__}")
                raise
            finally:
                _part(failures, number, world)
    finally:
        ranks.joined(False)


def read_together(read: Callable[[], T], settings: Callable[[T], Mapping[str, Any]]) -> T:
    """``read()``, which makes sense of a command line, in every process; help, and what is wrong with an option, is said once.

    Args:
        read: gives what the command needs.
        settings: what in it has to be the same in every process, by name.

    Raises:
        ValueError: it is not.
        SystemExit: ``read`` ended one of the processes so; then all end.
    """
    if ranks.count() == 1:
        return read()
    said, result, ended = io.StringIO(), None, None
    with redirect_stdout(said), redirect_stderr(said):
        try:
            result = read()
        except SystemExit as left:
            ended = left.code
    own = {} if result is None else dict(settings(result))
    found = ranks.gather_values((ended, said.getvalue(), own))
    for status, text, _ in found:
        if status is not None:
            if ranks.first():
                print(text, end="", file=sys.stderr if status else sys.stdout)
            raise SystemExit(status)
    for number, (_, _, others) in enumerate(found):
        for name in sorted(own.keys() | others.keys()):
            if own.get(name) != others.get(name):
                raise ValueError(
                    f"{name}: expected the same in every process, got {own.get(name)!r} in number {ranks.rank()} and "
                    f"{others.get(name)!r} in number {number}"
                )
    if ranks.first():
        print(said.getvalue(), end="", file=sys.stderr)
    return cast(T, result)


def _load_what_would_keep_the_group() -> None:
    """Import the modules of torch whose functions take the present group as a default; before there is one, that default is None.

    Loaded later they would keep the group, and Gloo's threads, beyond its end. A thread that still lets go of a tensor while Python
    shuts down aborts the process (``terminate called without an active exception``).
    """
    importlib.import_module("torch.distributed.nn.functional")
    importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, SIGTERM is ignored: torchrun sends it to those that are left, which are about to say why they end, and do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fail(store: dist.Store, number: int, error: Exception) -> None:
    """Raise ``error`` if it was the first of the group, else leave quietly.

    Raises:
        SystemExit: another process has said or will say what happened.
    """
    consequence = ranks.broke_off(error)
    said = _last_words(store) if consequence else None
    if said:
        _leave()
    if consequence and said is None:
        raise ranks.OtherRankError(
            "the first process of the run has ended, and all of them do (its own sentence says why, unless it was killed). What "
            f"was written is whole: the same command with --resume continues, with any number of processes ({error})"
        ) from error
    if not _claim(store, f"rank {number}: {error}"):
        _leave()
    if consequence:
        with suppress(RuntimeError):
            store.add(_PARTED, 1)  # in place of the one that is gone
        raise ranks.OtherRankError(
            "a process of the run is gone without a word (killed, or out of memory?), so all of them end. What was written is "
            f"whole: the same command with --resume continues, with any number of processes ({error})"
        ) from error
    raise error


def _part(store: dist.Store, number: int, world: int) -> None:
    """Say that this process has read what it needs from the store; the first one, in which that lives, waits for the others.

    It hangs up before, for they notice only then; on the CPU all do, lest a thread of Gloo outlives Python. The store of
    ``torchrun`` lives in that, and needs nobody to wait.
    """
    waits = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    deadline = time.monotonic() + _SECONDS_FOR_LAST_WORDS
    if not torch.cuda.is_available():  # NCCL would wait for the others
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
    with suppress(RuntimeError):  # the store is gone
        gone = store.add(_PARTED, 1)
        while waits and gone < world and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = store.add(_PARTED, 0)


def _last_words(store: dist.Store) -> bool | None:
    """Whether somebody has left a sentence, or does so within some seconds; None if the store is gone with its process."""
    try:
        store.wait([_FAILED], timedelta(seconds=_SECONDS_FOR_LAST_WORDS))
    except dist.DistNetworkError:
        return None
    except RuntimeError:
        return False
    return True


def _claim(store: dist.Store, sentence: str) -> bool:
    """Whether ``sentence`` is the first; also true if the store is gone, so that somebody speaks."""
    try:
        return store.compare_set(_FAILED, "", sentence).decode() == sentence
    except RuntimeError:
        return True


def _leave() -> None:
    sys.stdout.flush()
    raise SystemExit(2)


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdigit():
        raise ValueError(f"{name}: expected the number that torchrun sets, got {value!r}")
    return int(value)

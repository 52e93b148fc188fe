"""Being asked to stop: by Ctrl-C, by a batch system's SIGTERM, by a terminal that closes."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

_REPEATED_SECONDS = 0.5
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class StoppedError(RuntimeError):
    """The run was asked to stop; what it had done is saved and can be resumed."""


class Stoppable(Protocol):
    """What can be asked to stop."""

    def stop(self) -> None:
        """Save at the next possible moment and end."""


class StopOnSignal:
    """Within the block, the first signal lets ``run`` write a checkpoint, and a second one ends the process at once.

    Programs that signal a process and its group (``timeout``, batch systems) reach it twice; within half a second that counts
    as once. Before ``run`` is known there is nothing to save, and the first signal ends the process. SIGHUP that
    ``nohup`` ignores stays ignored.

    Attributes:
        run: whom to stop.
        speaks: say at once what the signal does; of several processes, which torchrun signals together and whose log says what
            it does, the first one alone says in the end where the run stopped.
        received: number of the first signal, or None; 128 more is the exit status that shells expect.
    """

    def __init__(self, run: Stoppable | None = None, *, speaks: bool = True) -> None:
        self.run, self.speaks = run, speaks
        self.received: int | None = None
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None and now - self._first < _REPEATED_SECONDS:
            return
        if self.run is None or self.received is not None:
            self._say(f"{signal.Signals(number).name}: stopped at once")
            self.__exit__()
            os.kill(os.getpid(), number)
            return
        self.received, self._first = number, now
        self.run.stop()
        self._say(f"{signal.Signals(number).name}: stopping after this step; a second one stops without a checkpoint")

    def _say(self, sentence: str) -> None:
        """Write to standard error in one system call: a handler may interrupt a print, which must not be entered twice."""
        if self.speaks:
            with suppress(OSError):  # a terminal that has closed
                os.write(2, f"{sentence}\n".encode())

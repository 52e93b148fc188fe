"""How torch reports the death of a data-loading process: by raising, in its handler of SIGCHLD, wherever the main thread is."""

from __future__ import annotations


def is_worker_death(error: BaseException) -> bool:
    """Whether ``error`` says that a data-loading process is gone, and nothing about where it was raised.

    An error that such a process met and handed on (``Caught RuntimeError in DataLoader worker process 0``) is none.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")

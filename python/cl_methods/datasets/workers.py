"""What a process that reads images leaves to the process that started it: signals, and connections to others."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

from cl_methods import ranks


def leave_to_the_parent(_: int) -> None:
    """Ctrl-C and batch systems reach worker processes too, but the parent decides when these end.

    SIGTERM ends a worker if the parent has sent it, as it does when Python ends, or if there is no parent any more. Connections to
    the other processes of a run are closed: held by a worker as well, they would outlive the parent, whose end nobody would notice.
    """
    if ranks.joined_count() > 1:
        _close_connections()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler is not told who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey, args=(os.getppid(),), name="sigterm", daemon=True).start()


def _obey(parent: int) -> None:
    lives, sender = True, 0
    while lives and sender != parent:
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        lives = os.getppid() == parent
    os._exit(0)  # another status would be reported as its death


def _close_connections() -> None:
    for entry in list(Path("/dev/fd").iterdir()):
        with suppress(OSError):  # it is no socket, or was the listing itself
            held = socket.socket(fileno=int(entry.name))
            if held.family in (socket.AF_INET, socket.AF_INET6):
                held.close()
            else:
                held.detach()

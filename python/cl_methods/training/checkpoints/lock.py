"""One process at a time writes into a run directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_methods.training.checkpoints.atomic import WriteError, writing
from cl_methods.training.checkpoints.folder import RunDirectoryError

LOCK = "run.lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
"""What file systems answer that know no locks."""
_MOST_BYTES = 1 << 16


class RunLock:
    """A file that its holder has locked with ``fcntl`` and in which it says who it is.

    The system lets go of the lock when the process ends, however it ends, so nothing is ever left to clean up: a file that is
    there and not locked is taken over. Child processes do not inherit the lock. It reaches as far as the file system's
    ``fcntl`` locks: all processes of a machine on local disks; all machines on NFS 4, and on NFS 3 with lockd. Where there are
    none, the file itself decides: a holder on this machine that still lives, or one on another machine, is respected; two that
    start in the same instant are not kept apart.

    Args:
        path: the file; its folder exists when :meth:`take` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._descriptor is not None

    def take(self) -> None:
        """Hold the lock until :meth:`release` or the end of the process.

        Raises:
            RunDirectoryError: another process holds it; the message says which.
            WriteError: the file cannot be written.
        """
        while self._descriptor is None:
            with writing(self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._claim(descriptor)
                if _same_file(descriptor, self.path):  # else its last holder has just removed it
                    with writing(self.path):
                        _write(descriptor, _description())
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def release(self) -> None:
        """Let go and remove the file; nothing happens if it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):  # the folder may be gone
            if _same_file(descriptor, self.path):
                self.path.unlink()
        os.close(descriptor)

    def _claim(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise self._in_use(_in_words(_read(descriptor))) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise WriteError(f"{self.path} cannot be locked ({error.strerror})") from error
            found = _read(descriptor)
            if found and not _same_process(found, _description()) and not _ended(found):
                hint = f" (the file system knows no locks: if that process is gone, delete {self.path})"
                raise self._in_use(_in_words(found) + hint) from None

    def _in_use(self, holder: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"output: {self.path.parent} is in use by {holder}; wait for its end or stop it, then go on with --resume, "
            "or choose another directory"
        )


def _description() -> dict[str, Any]:
    """This process, so that it cannot be mistaken for a later one of the same number."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _same_process(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other[key] for key in ("pid", "host", "started"))


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the machine did; None if there is none, or it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _ended(holder: dict[str, Any]) -> bool:
    """Whether a process is known to be gone: one of this machine, whose number is free or belongs to another by now."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _start_of(pid) != holder.get("started")


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    words = f"process {holder.get('pid')} on {holder.get('host')}, at work since {holder.get('since')}"
    return f"{words} ({holder['command']})" if holder.get("command") else words


def _read(descriptor: int) -> dict[str, Any]:
    """What a holder wrote; empty while it has not yet, or where it cannot be read."""
    try:
        found = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int, content: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{json.dumps(content)}\n".encode(), 0)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

"""Files that are written whole or not at all, and what is said when they cannot be."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cl_methods.backbone.smaller_parts import is_out_of_memory
from cl_methods.worker_death import is_worker_death

TEMPORARY = ".incomplete-"
"""Beginning of the names of what is being written; whatever bears it may be deleted."""


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system answers where this process may read and not write."""


class WriteError(OSError):
    """Something could not be written. The message names it and the reason; what was there before is untouched.

    Attributes:
        read_only: because this process may not write there, rather than for want of room or of the folder.
    """

    read_only = False


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path``, synchronise it and rename it over ``path``.

    Raises:
        WriteError: the disk is full, the folder is gone or may not be written; ``path`` is as it was.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)  # a full disk gets its room back
            raise
        synchronise(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell every library's failure to write ``path`` in the same words.

    Raises:
        WriteError: for OSError, SafetensorError and torch's RuntimeError.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_worker_death(error) or is_out_of_memory(error):  # which has nothing to do with the disk
            raise
        system = _of_the_system(error)
        reason = (system and system.strerror) or (str(error).splitlines() or [type(error).__name__])[0]
        read_only = system is not None and system.errno in _READ_ONLY
        remedy = "make the folder writable" if read_only else "make room or restore the folder"
        failure = WriteError(f"{path} cannot be written ({reason}); {remedy}, then try again (a run: with --resume)")
        failure.read_only = read_only
        raise failure from error


def _of_the_system(error: BaseException) -> OSError | None:
    """``error``, or what torch's own arose from, if the system says why."""
    found: BaseException | None = error
    while isinstance(found, RuntimeError):
        found = found.__cause__ or found.__context__
    return found if isinstance(found, OSError) else None


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name and place, synchronised, when the block ends well.

    Raises:
        WriteError: it cannot be written; what was at ``target`` is as it was.
    """
    with writing(target):
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=target.parent))
        try:
            yield folder
            for file in folder.iterdir():
                synchronise(file)
            synchronise(folder)
            if target.exists():
                remove_folder(target)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        synchronise(target.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a half-deleted one is never taken for complete."""
    doomed = path.with_name(f"{TEMPORARY}{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def synchronise(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """sha256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Being refused what a file's mode forbids, also where tests run as root, whom modes do not stop."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OVERRIDE = 1 << 1
"""CAP_DAC_OVERRIDE of linux/capability.h: write where the mode forbids it."""
_VERSION = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def obey_modes(obey: bool) -> None:
    """Whether this thread, if it is root's, is refused what modes forbid."""
    if os.geteuid():
        return
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(_VERSION, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0].effective = sets[0].effective & ~_OVERRIDE if obey else sets[0].effective | sets[0].permitted & _OVERRIDE
    if libc.capset(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capset")


def close(folder: Path) -> None:
    """Nothing may be written into ``folder`` or its folders any more, by this thread too."""
    for one in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        one.chmod(0o555)
    obey_modes(True)


def open_again(folder: Path) -> None:
    """Undo :func:`close`."""
    obey_modes(False)
    for one in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        one.chmod(0o755)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Inside, nothing may be written into ``folder``."""
    close(folder)
    try:
        yield
    finally:
        open_again(folder)

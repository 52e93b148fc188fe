"""A folder of derived data: entries made whole or not at all, shared between processes, the oldest removed when it is full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: CacheFolder.supported is False there
    fcntl = None  # type: ignore[assignment]

_MANIFEST = "manifest.json"
_MAKING, _REMOVING = ".incomplete-", ".removed-"
_ABANDONED_SECONDS = 3600
_FREE_BYTES = 2 * 2**30
_IN_USE = (errno.EEXIST, errno.ENOTEMPTY)


class CacheWarning(UserWarning):
    """A cache was damaged, full or cannot be written; results do not depend on it."""


class CacheEntry:
    """One entry, which nobody removes as long as this object lives.

    Attributes:
        place: its folder.
        manifest: what it was described as when it was made.
        writable: whether this user may add to it.
    """

    def __init__(self, place: Path, manifest: dict[str, Any], descriptor: int) -> None:
        self.place, self.manifest = place, manifest
        self.writable = all(os.access(path, os.W_OK) for path in (place, *place.iterdir()))
        weakref.finalize(self, os.close, descriptor)


class CacheFolder:
    """Derived data under one folder, at most ``limit`` bytes of it on disk.

    An entry is a folder of its own, made under a temporary name and renamed when it is complete, with a manifest that says
    what it holds and how large its files are. Whoever has an entry open holds a shared lock; the oldest entries that nobody
    has open are removed where room is needed. A folder that cannot be written is said once, and nothing is cached.

    Args:
        path: made when the first entry is.
        limit: bytes on disk; besides, 2 GiB of the file system stay free.

    Raises:
        ValueError: the limit is negative.
    """

    def __init__(self, path: Path, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit: expected a number of bytes >= 0, got {limit}")
        self.path, self.limit = Path(path), limit
        self._said: set[str] = set()

    @staticmethod
    def supported() -> bool:
        """Whether this system has the file locks and positioned writes that entries need."""
        return fcntl is not None and hasattr(os, "pwrite")

    def entry(
        self, kind: str, description: dict[str, Any], make: Callable[[Path], dict[str, Any]] | None = None
    ) -> CacheEntry | None:
        """The entry for a description, made if it is not there or damaged; None where that is impossible.

        Args:
            kind: sub-folder.
            description: plain values that decide the content; the entry's name is their hash.
            make: writes the files of a new entry into a folder and returns what else to note in its manifest; under ``"files"``
                sizes by name, for files whose size never changes.
        """
        if not self.supported():
            return None
        told = json.dumps(description, sort_keys=True)
        place = self.path / kind / hashlib.sha256(told.encode()).hexdigest()[:24]
        try:
            for _ in range(8):  # more than one round only if others remove the entry at this moment
                opened = self._open(place, json.loads(told))
                if opened is not None:
                    return opened
                self._make(place, json.loads(told), make)
        except OSError as error:
            self.say(f"{self.path} cannot be used ({error}): nothing is cached there")
        return None

    def say(self, sentence: str) -> None:
        """Warn, once for each sentence."""
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(f"cache: {sentence}", CacheWarning, stacklevel=2)

    def has_room(self) -> bool:
        """Whether more may be written, after removing the oldest entries that nobody uses."""
        used = self.used()
        if used < self.limit and self._free() > _FREE_BYTES:
            return True
        for place in self._oldest_first():
            used -= self._remove_unused(place)
            if used < self.limit and self._free() > _FREE_BYTES:
                return True
        return False

    def require_room(self) -> None:
        """Make sure that more may be written.

        Raises:
            OSError: it may not, even after removing what nobody uses.
        """
        if not self.has_room():
            full = f"{self.path} holds the {self.limit / 2**30:g} GiB it may, or its disk is nearly full"
            raise OSError(errno.ENOSPC, f"{full}; --data.cache-gib gives it more room")

    def used(self) -> int:
        """Bytes of all entries on disk."""
        return sum(_bytes_on_disk(place) for place in self._entries())

    def _open(self, place: Path, description: dict[str, Any]) -> CacheEntry | None:
        while True:
            try:
                descriptor = os.open(place / _MANIFEST, os.O_RDONLY)
            except FileNotFoundError:
                if place.is_dir():
                    self.discard(place, f"{place / _MANIFEST} is missing")
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_still(place / _MANIFEST, descriptor):
                break
            os.close(descriptor)  # removed while we waited
        problem, manifest = _damage(place, description)
        if problem is not None:
            os.close(descriptor)
            self.discard(place, problem)
            return None
        with contextlib.suppress(PermissionError):  # another user's entry: its age is theirs
            os.utime(place / _MANIFEST)
        return CacheEntry(place, manifest, descriptor)

    def _make(self, place: Path, description: dict[str, Any], make: Callable[[Path], dict[str, Any]] | None) -> None:
        new = place.with_name(f"{_MAKING}{uuid.uuid4().hex}")
        new.mkdir(parents=True)
        try:
            extra = make(new) if make is not None else {}
            (new / _MANIFEST).write_text(json.dumps({"description": description, **extra}, indent=1), encoding="utf-8")
            new.rename(place)
        except OSError as error:
            if error.errno not in _IN_USE:  # else another process was faster, and its entry is as good
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def discard(self, place: Path, problem: str) -> None:
        """Take a damaged entry out of the way; whoever has it open keeps what it reads."""
        self.say(f"{problem}; what it held is made again")
        self._take_away(place)

    def _take_away(self, place: Path) -> None:
        gone = place.with_name(f"{_REMOVING}{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            place.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _remove_unused(self, place: Path) -> int:
        """Remove an entry that nobody has open.

        Returns:
            The bytes that this freed.
        """
        size = _bytes_on_disk(place)
        try:
            descriptor = os.open(place / _MANIFEST, os.O_RDONLY)
        except OSError:
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_away(place)
        except OSError:  # in use, or not ours to remove
            return 0
        finally:
            os.close(descriptor)
        return size

    def _entries(self) -> Iterator[Path]:
        """Entries of every kind; what killed processes left half made or half removed is cleared away on the way."""
        for kind in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            for place in sorted(kind.iterdir()) if kind.name in KINDS and kind.is_dir() else []:
                if not place.name.startswith((_MAKING, _REMOVING)):
                    yield place
                elif time.time() - _modified(place) > _ABANDONED_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)

    def _oldest_first(self) -> list[Path]:
        return sorted(self._entries(), key=lambda place: _modified(place / _MANIFEST))

    def _free(self) -> int:
        return shutil.disk_usage(self.path).free if self.path.is_dir() else 2 * _FREE_BYTES


KINDS = ("images", "features")
"""Sub-folders whose entries count towards the limit; the folder may hold other things."""


def _damage(place: Path, description: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with an entry, and its manifest."""
    path = place / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path} is damaged ({error})", {}
    if not isinstance(manifest, dict) or manifest.get("description") != description:
        return f"{path} describes something else", {}
    for name, size in manifest.get("files", {}).items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found:,} bytes"
            return f"{place / name} {has} where its manifest says {size:,}", {}
    return None, manifest


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _bytes_on_disk(place: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # removed at this moment
        for entry in os.scandir(place):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_blocks * 512
    return total

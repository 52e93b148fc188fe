"""Checking that every image of a scenario can be decoded, before hours of training start."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from cl_methods.datasets.images import DataError
from cl_methods.scenarios.cache import cache_folder

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, are cut off or are damaged."""
_LISTED = 5


def verify_images(files: Sequence[Path], *, threads: int | None = None) -> None:
    """Decode every file once: first all headers, which finds most damage in seconds, then all pixels.

    A list that was found in order is remembered by names, sizes and modification times in the user's cache
    folder, so that the next run over the same files starts at once.

    Args:
        files: images.
        threads: decoding threads; Pillow decodes outside the interpreter lock. Default: the number of processors.

    Raises:
        DataError: names up to five of the files that cannot be read, and why.
    """
    mark = cache_folder() / "verified-images" / _state(files)
    if mark.exists():
        return
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for check in (_header, _pixels):
            problems = [problem for problem in pool.map(check, files) if problem is not None]
            if problems:
                raise DataError(join_problems(problems))
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def join_problems(problems: Iterable[str]) -> str:
    """The first few problems as one message, and how many more there are."""
    found = list(problems)
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return "; ".join(found[:_LISTED]) + more


def _header(path: Path) -> str | None:
    try:
        with Image.open(path):
            return None
    except UNREADABLE as error:
        return _problem(path, error)


def _pixels(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            return None
    except UNREADABLE as error:
        return _problem(path, error)


def _problem(path: Path, error: Exception) -> str:
    size = path.stat().st_size if path.exists() else 0
    reason = "it is empty" if size == 0 else " ".join(str(error).replace(f"'{path}'", "it").split())
    return f"{path} is not a readable image ({reason}): replace it or delete it"


def _state(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.absolute()}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()

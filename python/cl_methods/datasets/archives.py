"""Uncompressed tar archives read in place, after making sure that each is whole."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cl_methods.datasets.images import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar archive: where its bytes are."""

    archive: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Part:
    """A member of a shard as WebDataset names it: ``KEY.SUFFIX`` belongs to the sample ``KEY``.

    Attributes:
        key: with the folder, without the suffix.
        suffix: in lower case, with its dot.
        member: where the bytes are.
        content: the bytes, where they were asked for.
    """

    key: str
    suffix: str
    member: Member
    content: bytes = b""


def shards(folder: Path) -> list[Path]:
    """Archives directly in a folder, sorted; compressed ones too, so that they can be refused by name."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith("."))


def parts(shard: Path, name: str, read: frozenset[str]) -> Iterator[Part]:
    """The files in a shard, in its order.

    Args:
        shard: the archive.
        name: what members call it.
        read: suffixes of files whose content is wanted.

    Raises:
        DataError: the archive is cut off, compressed or none.
    """
    size = shard.stat().st_size
    _require_end(shard)
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if not entry.isfile():
                    continue
                if entry.offset_data + entry.size > size:
                    raise DataError(f"{shard} is cut off inside {entry.name}; fetch it again")
                place, slash, base = entry.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                suffix = f"{dot}{suffix.lower()}"
                file = archive.extractfile(entry) if suffix in read else None
                content = file.read() if file is not None else b""
                yield Part(
                    place + slash + stem, suffix, Member(name, entry.name, entry.offset_data, entry.size), content
                )
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} is cut off, compressed or not a tar archive ({error}); fetch it again") from error


def _require_end(shard: Path) -> None:
    """An archive ends with two empty blocks; one that was cut off between two members does not, and reads without an error."""
    with shard.open("rb") as file:
        if shard.suffix == ".tar" and file.seek(0, 2) >= 1024:
            file.seek(-1024, 2)
            if any(file.read()):
                raise DataError(f"{shard} is cut off: it does not end as a tar archive does; fetch it again")

"""Images decoded and resized once: uint8 pixels in a memory-mapped file, with a checksum and the state of the source for each."""

from __future__ import annotations

import copy
import os
import weakref
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features
from torch import Tensor
from typing_extensions import override

from cl_methods.datasets.cache_folder import CacheEntry, CacheFolder
from cl_methods.datasets.images import ImageSource, RawImage, Subset
from cl_methods.datasets.two_stage import TwoStage

FORMAT = 1
_PIXELS, _ROWS = "pixels.u8", "rows.u64"
_ROW_BYTES = 16
_STORED = 1 << 32
"""Set in the second word of a row that holds an image; the lower half is the CRC-32 of its pixels."""
_WRITES_PER_LOOK = 64


class CachedImages(ImageSource):
    """Another source whose images are decoded and resized once per geometry, now or in an earlier run.

    Raw images, labels and fingerprint are those of the source. :meth:`pixels` is what is kept: an image is stored when it is
    first asked for, and read back only if the file it came from has the size and times that it had then, and the pixels their
    checksum. Else it is decoded again, which is said once. Several processes may read and write at the same time.

    Args:
        source: whose :meth:`~cl_methods.datasets.images.ImageSource.location` is not None.
        folder: where the pixels are kept.
    """

    def __init__(self, source: ImageSource, folder: CacheFolder) -> None:
        self.source, self.folder, self.labels = source, folder, source.labels
        self._stores: dict[str, _Store | None] = {}
        self._first: dict[str, tuple[tuple[int, int], Tensor]] = {}
        self._location: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}, "_first": {}}

    @override
    def image(self, index: int) -> RawImage:
        return self.source.image(index)

    @override
    def fingerprint(self) -> str:
        return self.source.fingerprint()

    @override
    def location(self) -> str | None:
        if self._location is None:
            self._location = self.source.location()
        return self._location

    @override
    def origin(self, index: int) -> str:
        return self.source.origin(index)

    @override
    def stamp(self, index: int) -> int:
        return self.source.stamp(index)

    def pixels(self, index: int, stages: TwoStage) -> Tensor | NDArray[np.uint8]:
        """``stages.pixels(image(index))``: uint8 (3, R, R), not to be written to.

        Raises:
            DataError: the image has to be decoded and cannot be.
        """
        if stages.pixels_key not in self._stores:
            self.prepare(index, stages)
        store = self._stores[stages.pixels_key]
        if store is None:
            return stages.pixels(self.source.image(index))
        stamp = self.source.stamp(index)
        if store.holds(index):
            if store.stamp(index) != stamp:
                origin = self.source.origin(index)
                self.folder.say(
                    f"{origin} has changed since it was decoded; it is decoded again, like others that have"
                )
            else:
                kept = store.read(index)
                if kept is not None:
                    return kept
        decoded_at, first = self._first.pop(stages.pixels_key, (None, None))
        made = first if first is not None and decoded_at == (index, stamp) else stages.pixels(self.source.image(index))
        store.write(index, stamp, made)
        return made

    def prepare(self, index: int, stages: TwoStage) -> None:
        """Open what is kept for a geometry, or begin it with the shape that the image at ``index`` has."""
        if stages.pixels_key in self._stores:
            return
        description = {
            "format": FORMAT,
            "images": self.location(),
            "count": len(self.source),
            "geometry": stages.pixels_key,
            "decoder": decoder_versions(),
        }

        def make(place: Path) -> dict[str, Any]:
            decoded_at = index, self.source.stamp(index)
            pixels = stages.pixels(self.source.image(index))
            self._first[stages.pixels_key] = decoded_at, pixels  # this image is asked for next
            shape = tuple(pixels.shape)
            sizes = {_PIXELS: len(self.source) * int(np.prod(shape)), _ROWS: len(self.source) * _ROW_BYTES}
            for name, size in sizes.items():
                with (place / name).open("wb") as file:
                    file.truncate(size)  # holes take no room until an image is written into them
            return {"shape": shape, "files": sizes}

        entry = self.folder.entry("images", description, make)
        self._stores[stages.pixels_key] = None if entry is None else _Store(entry, self.folder, len(self.source))


class _Store:
    """The two files of one entry: rows of pixels, and for each row the stamp of its image and the checksum."""

    def __init__(self, entry: CacheEntry, folder: CacheFolder, count: int) -> None:
        self.entry, self.folder = entry, folder
        self.shape = tuple(entry.manifest["shape"])
        mode = os.O_RDWR if entry.writable else os.O_RDONLY
        files = [os.open(entry.place / name, mode) for name in (_PIXELS, _ROWS)]
        weakref.finalize(self, _close, files)
        self._files = files
        self._pixels = np.memmap(entry.place / _PIXELS, np.uint8, "r", shape=(count, *self.shape))
        self._rows = np.memmap(entry.place / _ROWS, np.uint64, "r", shape=(count, 2))
        self._writes = 0 if entry.writable else -1
        self._changed = False

    def holds(self, index: int) -> bool:
        """Whether an image has been stored."""
        return bool(int(self._rows[index, 1]) & _STORED)

    def stamp(self, index: int) -> int:
        """The stamp of a stored image when it was decoded."""
        return int(self._rows[index, 0])

    def say_changed(self, origin: str) -> None:
        """Name the first of the images whose files are not what they were."""
        if not self._changed:
            self._changed = True
            self.folder.say(
                f"{origin} has changed since it was decoded; it is decoded again, and so are others that have"
            )

    def read(self, index: int) -> NDArray[np.uint8] | None:
        """The pixels (3, R, R) of a stored image, if they are whole."""
        pixels = self._pixels[index]
        if zlib.crc32(pixels) != int(self._rows[index, 1]) & (_STORED - 1):
            self.folder.say(f"{self.entry.place / _PIXELS} is damaged; the images concerned are decoded again")
            return None
        return pixels

    def write(self, index: int, stamp: int, pixels: Tensor) -> None:
        """Keep ``pixels`` (3, R, R): the pixels first, then the row that vouches for them."""
        if self._writes < 0 or tuple(pixels.shape) != self.shape:
            return
        content = pixels.numpy().tobytes()
        row = np.array([stamp, _STORED | zlib.crc32(content)], np.uint64).tobytes()
        try:
            if self._writes % _WRITES_PER_LOOK == 0:
                self.folder.require_room()
            self._writes += 1
            _write_at(self._files[0], content, index * len(content))
            _write_at(self._files[1], row, index * _ROW_BYTES)
        except OSError as error:
            self._writes = -1
            self.folder.say(f"{self.entry.place} cannot be written ({error}): further images are decoded each time")


def cached(source: ImageSource, folder: CacheFolder, known: dict[int, ImageSource] | None = None) -> ImageSource:
    """``source`` with its images cached; itself where they are in memory or of a kind that is not known.

    Subsets share what their common source keeps.

    Args:
        source: any source.
        folder: where to keep pixels.
        known: sources that have been wrapped already, by their ``id``; shared between calls.
    """
    known = {} if known is None else known
    if id(source) not in known:
        if isinstance(source, Subset):
            made: ImageSource = copy.copy(source)
            made.source = cached(source.source, folder, known)  # type: ignore[attr-defined]
        else:
            made = source if source.location() is None else CachedImages(source, folder)
        known[id(source)] = made
    return known[id(source)]


def decoder_versions() -> list[str]:
    """Versions that decide how bytes become pixels."""
    versions = {
        "Pillow": PIL.__version__,
        "JPEG": features.version("jpg"),
        "torchvision": metadata.version("torchvision"),
    }
    return [f"{name} {version}" for name, version in versions.items()]


def _write_at(file: int, content: bytes, place: int) -> None:
    while content:
        done = os.pwrite(file, content, place)
        content, place = content[done:], place + done


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)

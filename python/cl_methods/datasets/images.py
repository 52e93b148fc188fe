"""Labelled images before any transform, in memory or in files."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from typing_extensions import override

RawImage = Image.Image | Tensor
"""An image before any transform: a PIL image, or a uint8 tensor (3, H, W)."""


UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are no image, are cut off, are damaged, or say that they are absurdly large."""


class DataError(ValueError):
    """Data on disk is not what it should be. The message names the file and says what to do."""


def unreadable(path: Path, error: Exception) -> DataError:
    """What is said of an image file that ``error`` kept from being read: it is gone, the system fails, or it holds no image."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} is gone; restore it")
    reason = getattr(error, "strerror", None)
    if reason:
        return DataError(f"{path} cannot be read ({reason}); restore it")
    return DataError(f"{path} is not a readable image ({error}); replace it or remove it")


class ImageSource(ABC):
    """A fixed list of labelled images, read one at a time.

    Attributes:
        labels: (N,) int64 class indices; -1 where the images carry no label.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> RawImage:
        """The image at ``index``, before any transform."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over what identifies the images (tensor contents, or the sorted relative file list) and the labels."""

    def locate(self, index: int) -> tuple[ImageSource, int]:
        """The source that holds the image at ``index``, and its place there."""
        return self, index

    def location(self) -> str | None:
        """What tells the images from all others, place by place, on this machine; None where they are held in memory.

        With :meth:`stamp` it decides whether something that was derived from an image is still true.
        """
        return None

    def origin(self, index: int) -> str:
        """Where an image comes from, for messages."""
        return f"image {index}"

    def stamp(self, index: int) -> int:
        """64 bits that change when the file behind an image does; 0 where no file can, or where there is none any more."""
        return 0


class TensorImages(ImageSource):
    """Images held in memory as one uint8 tensor (N, 3, H, W).

    Raises:
        ValueError: ``images`` is not uint8 (N, 3, H, W), or ``labels`` is not int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if labels is None:
            labels = torch.full((len(images),), -1, dtype=torch.int64)
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(f"labels: expected int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
        self.images, self.labels = images, labels

    @override
    def image(self, index: int) -> Tensor:
        return self.images[index]

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class FileImages(ImageSource):
    """Images in files under one root.

    The fingerprint covers relative paths and labels, not the pixels: hashing a large dataset would take minutes.

    Args:
        root: the folder that the paths start from.
        paths: N of them.
        labels: (N,) int64.

    Raises:
        ValueError: the labels have another shape or dtype.
        DataError: (on access) a file cannot be decoded.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.shape != (len(paths),):
            raise ValueError(f"labels: expected int64 ({len(paths)},), got {labels.dtype} {tuple(labels.shape)}")
        self.root, self.paths, self.labels = Path(root), tuple(paths), labels

    @override
    def image(self, index: int) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except UNREADABLE as error:
            raise unreadable(path, error) from error

    @override
    def fingerprint(self) -> str:
        rows = sorted(f"{path}\t{label}" for path, label in zip(self.paths, self.labels.tolist(), strict=True))
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    @override
    def location(self) -> str:
        return hashlib.sha256("\n".join(["files", str(self.root.absolute()), *self.paths]).encode()).hexdigest()

    @override
    def origin(self, index: int) -> str:
        return str(self.root / self.paths[index])

    @override
    def stamp(self, index: int) -> int:
        return file_stamp(os.path.join(self.root, self.paths[index]))  # noqa: PTH118 - many times as fast as a Path


class Subset(ImageSource):
    """Some images of another source, in the order of ``indices`` (N,) int64."""

    def __init__(self, source: ImageSource, indices: Tensor) -> None:
        self.source, self.indices, self.labels = source, indices, source.labels[indices]

    @override
    def image(self, index: int) -> RawImage:
        return self.source.image(int(self.indices[index]))

    @override
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.indices.numpy().tobytes()).hexdigest()

    @override
    def locate(self, index: int) -> tuple[ImageSource, int]:
        return self.source.locate(int(self.indices[index]))

    @override
    def origin(self, index: int) -> str:
        return self.source.origin(int(self.indices[index]))

    @override
    def stamp(self, index: int) -> int:
        return self.source.stamp(int(self.indices[index]))


def file_stamp(path: str | Path) -> int:
    """64 bits over the size of a file and the times at which its content and its entry last changed; 0 if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path for each of many images costs more than the look at it
    except OSError:
        return 0
    state = b"%d %d %d" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")

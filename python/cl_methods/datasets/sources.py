"""Images in memory, in tar archives and in Arrow tables, read lazily and safe to send to worker processes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from typing_extensions import override

from cl_methods.datasets.archives import Member
from cl_methods.datasets.images import UNREADABLE, DataError, FileImages, ImageSource, Subset, file_stamp


class ArrayImages(ImageSource):
    """Images held in memory as one uint8 array, given as RGB images to the transforms, like those read from files.

    Args:
        pixels: (N, H, W) grey or (N, H, W, 3).
        labels: (N,) int64.

    Raises:
        ValueError: another shape or dtype.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: Tensor) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3):
            raise ValueError(f"pixels: expected uint8 (N, H, W) or (N, H, W, 3), got {pixels.dtype} {pixels.shape}")
        if labels.dtype != torch.int64 or labels.shape != (len(pixels),):
            raise ValueError(f"labels: expected int64 ({len(pixels)},), got {labels.dtype} {tuple(labels.shape)}")
        self.pixels, self.labels = pixels, labels

    @override
    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    @override
    def location(self) -> str:
        """Over the pixels themselves: decoded they are, but not resized."""
        digest = hashlib.sha256(f"array\n{self.pixels.shape}\n".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()


class TarImages(ImageSource):
    """Images inside tar archives, read in place.

    The fingerprint covers the members' names, with their archive, and the labels.

    Args:
        root: the folder that the archives' names start from.
        members: N of them.
        labels: (N,) int64.

    Raises:
        DataError: (on access) a member cannot be decoded.
    """

    def __init__(self, root: Path, members: Sequence[Member], labels: Tensor) -> None:
        self.root, self.members, self.labels = Path(root), tuple(members), labels

    @override
    def image(self, index: int) -> Image.Image:
        member = self.members[index]
        try:
            with (self.root / member.archive).open("rb") as file:
                file.seek(member.offset)
                return Image.open(io.BytesIO(file.read(member.size))).convert("RGB")
        except UNREADABLE as error:
            raise DataError(f"{self.origin(index)} is not a readable image ({error}); replace the archive") from error

    @override
    def fingerprint(self) -> str:
        rows = sorted(
            f"{member.archive}/{member.name}\t{label}"
            for member, label in zip(self.members, self.labels.tolist(), strict=True)
        )
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    @override
    def location(self) -> str:
        rows = [f"{member.archive}\t{member.offset}\t{member.size}" for member in self.members]
        return hashlib.sha256("\n".join(["tar", str(self.root.absolute()), *rows]).encode()).hexdigest()

    @override
    def origin(self, index: int) -> str:
        return f"{self.members[index].name} in {self.root / self.members[index].archive}"

    @override
    def stamp(self, index: int) -> int:
        return file_stamp(self.root / self.members[index].archive)


def take(source: ImageSource, indices: Tensor) -> ImageSource:
    """The images of ``source`` at ``indices`` (N,) int64, of the same kind where the kind is a list of files."""
    if isinstance(source, FileImages):
        return FileImages(source.root, [source.paths[index] for index in indices.tolist()], source.labels[indices])
    if isinstance(source, TarImages):
        return TarImages(source.root, [source.members[index] for index in indices.tolist()], source.labels[indices])
    if isinstance(source, Subset):
        return Subset(source.source, source.indices[indices])
    return Subset(source, indices)

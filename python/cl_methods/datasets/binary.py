"""Datasets whose images come as arrays: MNIST's idx files and the pickles of CIFAR."""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from cl_methods.datasets.images import DataError
from cl_methods.datasets.sources import ArrayImages

_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that a pickled array needs; a dataset's file may not call anything else."""


def read_idx_pair(images: Path, labels: Path) -> ArrayImages:
    """Images and labels of one part of MNIST, from ``NAME`` or ``NAME.gz``.

    Raises:
        DataError: a file is missing, cut off, of another format, or they differ in length.
    """
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise DataError(f"{images} holds {len(pixels)} images but {labels} {len(numbers)} labels; replace both")
    if numbers.max(initial=0) > 9:
        raise DataError(f"{labels} holds the label {numbers.max()}; expected the digits 0 to 9")
    return ArrayImages(pixels, torch.from_numpy(numbers.astype(np.int64)))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of bytes: 0, 0, 8, the number of dimensions, each of them as four bytes, the values."""
    found = next((each for each in (path, path.with_name(f"{path.name}.gz")) if each.is_file()), None)
    if found is None:
        raise DataError(f"{path} is missing (with or without .gz)")
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{found} is cut off or damaged ({error}); replace it") from error
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{found} is not an idx file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}")
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    expected = start + int(np.prod(shape))
    if len(shape) != dimensions or len(content) != expected:
        raise DataError(f"{found} has {len(content):,} bytes where its header says {expected:,}; replace it")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar(path: Path, label_key: str, classes: int) -> ArrayImages:
    """Images and labels of one pickled part of CIFAR, whose rows are 3 x 32 x 32 bytes.

    Args:
        path: such as ``train`` of CIFAR100.
        label_key: ``fine_labels`` or ``labels``.
        classes: how many there are.

    Raises:
        DataError: the file is missing, cut off, or not what CIFAR's files are.
    """
    content = read_cifar_pickle(path)
    try:
        pixels, labels = np.asarray(content["data"]), torch.tensor(content[label_key], dtype=torch.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} has no {label_key} beside its data ({error!r}); it belongs to another dataset"
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise DataError(
            f"{path}: expected bytes ({len(labels)}, 3072) for its labels, got {pixels.dtype} {pixels.shape}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"{path}: expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return ArrayImages(np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels)


def read_cifar_pickle(path: Path) -> dict[str, Any]:
    """The mapping in one of CIFAR's pickles; nothing but arrays and plain values can be loaded.

    Raises:
        DataError: the file is missing, cut off or holds anything else.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; extract the archive that it belongs to again")
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise DataError(f"{path} is cut off or is not one of CIFAR's pickles ({error}); replace it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected one of CIFAR's pickled mappings")
    return content


class _ArraysOnly(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image needs")
        return super().find_class(module, name)

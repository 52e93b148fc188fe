"""How fast images come decoded and from the cache, beside the transform applied to every image anew."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_methods.datasets.cache_folder import CacheFolder
from cl_methods.datasets.image_cache import cached
from cl_methods.datasets.images import FileImages, ImageSource
from cl_methods.datasets.loading import Transform, read_images


def write_photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> FileImages:
    """Coloured shapes with fine texture as JPEG files of quality 90, about as many bytes as photographs of that size have.

    Args:
        folder: where to write; made if it is not there.
        count: how many.
        size: width and height in pixels.
        seed: the same files for the same seed.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05d}.jpg" for number in range(count)]
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        textured = smooth + generator.normal(0, 10, (size[1], size[0], 1))
        Image.fromarray(textured.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    return FileImages(folder, names, torch.zeros(count, dtype=torch.int64))


def measure_decoding(
    folder: Path,
    transform: Transform,
    *,
    images: int = 500,
    size: tuple[int, int] = (500, 375),
    batch_size: int = 50,
    rounds: int = 2,
) -> dict[str, Any]:
    """Images per second in this process: the plain transform, an empty cache, the same cache again; interleaved, best of each.

    Args:
        folder: for the images and the cache; both stay there.
        transform: an evaluation transform, such as open_clip's own.
        images, size: how many JPEG files of how many pixels.
        batch_size: images per batch.
        rounds: how often everything is measured.

    Returns:
        ``images``, ``bytes_per_image`` of the files, ``cache_bytes``, ``identical`` (all tensors of both passes, to the bit),
        ``plain``, ``first`` and ``second`` in images per second, those of every round in ``speeds``, and the ratios
        ``second_over_first`` and ``second_over_plain``.
    """
    source = write_photographs(folder / "jpeg", images, size)
    speeds: dict[str, list[float]] = {"plain": [], "first": [], "second": []}
    identical = True
    used = 0
    for _ in range(rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        kept = CacheFolder(folder / "cache", 2**40)
        expected: dict[int, Tensor] = {}

        def same(start: int, batch: Tensor, expected: dict[int, Tensor] = expected) -> bool:
            return torch.equal(expected.setdefault(start, batch), batch)

        for name, read in (("plain", source), ("first", cached(source, kept)), ("second", cached(source, kept))):
            speed, equal = _pass(read, transform, batch_size, same)
            speeds[name].append(speed)
            identical = identical and equal
        used = kept.used()
    best = {name: max(found) for name, found in speeds.items()}
    sizes = [(source.root / name).stat().st_size for name in source.paths]
    return {
        "images": images,
        "bytes_per_image": round(sum(sizes) / images),
        "cache_bytes": used,
        "identical": identical,
        **best,
        "speeds": speeds,
        "second_over_first": best["second"] / best["first"],
        "second_over_plain": best["second"] / best["plain"],
    }


def _pass(
    source: ImageSource, transform: Transform, batch_size: int, same: Callable[[int, Tensor], bool]
) -> tuple[float, bool]:
    """Images per second of one pass, and whether every batch is what the first pass gave; comparing is not timed."""
    seconds, equal = 0.0, True
    for start in range(0, len(source), batch_size):
        begin = time.perf_counter()
        batch = read_images(source, range(start, min(start + batch_size, len(source))), transform)
        seconds += time.perf_counter() - begin
        equal = same(start, batch) and equal
    return len(source) / seconds, equal

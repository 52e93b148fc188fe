"""Rows of suite ``evaluation`` about reading images: from the cache, beside the transform applied to every file anew."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from cl_methods.bench.agreement import CheckError
from cl_methods.bench.rows import OURS, Row, Samples
from cl_methods.datasets.cache_benchmark import measure_decoding
from cl_methods.datasets.loading import Transform

PLAIN, EMPTY = "transform of each file", "empty cache"


def decoding_rows(
    transform: Transform,
    *,
    images: int = 500,
    size: tuple[int, int] = (500, 375),
    batch_size: int = 50,
    rounds: int = 2,
) -> list[Row]:
    """Seconds for some JPEG files read a second time through the image cache, beside the first time and no cache.

    Args:
        transform: an evaluation transform.
        images, size, batch_size, rounds: see :func:`~cl_methods.datasets.cache_benchmark.measure_decoding`.

    Raises:
        CheckError: the cache gives other pixels than the transform.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = measure_decoding(
            Path(folder), transform, images=images, size=size, batch_size=batch_size, rounds=rounds
        )
    case = f"reading {images:,} JPEG files of {size[0]} x {size[1]} pixels, {batch_size} at once"
    if not found["identical"]:
        raise CheckError(f"{case}: the cache gives other tensors than the transform, expected the same to the bit")
    rows = []
    for name, key in ((OURS, "second"), (PLAIN, "plain"), (EMPTY, "first")):
        seconds = [images / one for one in found["speeds"][key]]
        samples = Samples(min(seconds), statistics.median(seconds), rounds)
        row = Row(case, name, measured={"seconds": samples}, note=f"{found[key]:,.0f} images/s")
        rows.append(row)
    rows[0].checked = {"pixels": 0.0}
    return rows

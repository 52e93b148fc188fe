"""Images and captions that distillation may look at: a folder, and a text file or a table of Conceptual Captions."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from cl_methods.datasets.images import DataError, FileImages
from cl_methods.datasets.listing import images_below
from cl_methods.datasets.task import Reference


def read_reference(images: Path | None, captions: Path | None) -> Reference | None:
    """Reference data from what was given; None if nothing was.

    Args:
        images: folder with images at any depth, such as ImageNet's ``train``; folders' names are not looked at.
        captions: see :func:`read_captions`; without them there are none, which methods that need some refuse.

    Raises:
        DataError: the folder holds no image, captions were given without images, or the captions cannot be read.
    """
    if images is None:
        if captions is not None:
            raise DataError(f"data.reference_images: needed beside data.reference_captions {captions}")
        return None
    if not images.is_dir():
        raise DataError(f"data.reference_images: {images} is not a directory")
    paths = images_below(images)
    if not paths:
        raise DataError(f"data.reference_images: {images} holds no image")
    labels = torch.full((len(paths),), -1, dtype=torch.int64)
    return Reference(FileImages(images, paths, labels), read_captions(captions) if captions is not None else ())


def read_captions(path: Path) -> tuple[str, ...]:
    """Captions from a text file, one per line, or from a tab-separated table as Conceptual Captions is distributed.

    In a table the captions are the column ``title`` or ``caption`` of the header, and the first column where there is no such
    header.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or holds no caption.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.reference_captions: {path} cannot be read as UTF-8 text ({error})") from error
    rows = [line for line in text.splitlines() if line.strip()]
    if rows and "\t" in rows[0]:
        table = list(csv.reader(rows, delimiter="\t", quoting=csv.QUOTE_NONE))
        column = next((name for name in ("title", "caption") if name in table[0]), None)
        place = table[0].index(column) if column is not None else 0
        rows = [row[place] for row in table[1 if column is not None else 0 :] if len(row) > place]
    captions = tuple(row.strip() for row in rows if row.strip())
    if not captions:
        raise DataError(f"data.reference_captions: {path} holds no caption")
    return captions

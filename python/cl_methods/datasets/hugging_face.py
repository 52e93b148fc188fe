"""Copies of a dataset as Hugging Face `datasets` keep them: Arrow files of ``save_to_disk``, or Parquet files of the Hub."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from cl_methods.datasets.images import UNREADABLE, DataError, ImageSource, file_stamp
from cl_methods.datasets.listing import SPLIT_NAMES, Listing, require_all_classes
from cl_methods.datasets.texts import Classes


class TableImages(ImageSource):
    """Encoded images in a column of Arrow or Parquet files, memory-mapped where the format allows it, opened once per process.

    Args:
        root: the folder that the files' names start from.
        files: in the order of the rows.
        column: of the images: structs with ``bytes``.
        labels: (N,) int64.

    Raises:
        DataError: (on access) a row holds no readable image.
    """

    def __init__(self, root: Path, files: list[str], column: str, labels: Tensor) -> None:
        self.root, self.files, self.column, self.labels = Path(root), tuple(files), column, labels
        self._rows: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    @override
    def image(self, index: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._bytes(index))).convert("RGB")
        except UNREADABLE as error:
            raise DataError(f"{self.origin(index)} is not a readable image ({error})") from error

    @override
    def fingerprint(self) -> str:
        """sha256 over every encoded image and label, in order."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for index in range(len(self)):
            digest.update(self._bytes(index))
        return digest.hexdigest()

    @override
    def location(self) -> str:
        told = ["table", str(self.root.absolute()), self.column, str(len(self)), *self.files]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @override
    def origin(self, index: int) -> str:
        return f"row {index} of {self.root / self.files[0]} …"

    @override
    def stamp(self, index: int) -> int:
        """Over all files: a row's place does not tell which of them holds it."""
        stamps = "".join(str(file_stamp(self.root / name)) for name in self.files)
        return int.from_bytes(hashlib.blake2b(stamps.encode(), digest_size=8).digest(), "little")

    def _bytes(self, index: int) -> bytes:
        if self._rows is None:
            tables = [_table(self.root / name) for name in self.files]
            self._rows = _arrow().concat_tables([table.select([self.column]) for table in tables]).column(0)
        content = self._rows[index].as_py()
        if not content or not content.get("bytes"):
            raise ValueError("it has no bytes; save the dataset with its images embedded")
        return content["bytes"]


def read_tables(folder: Path, classes: Classes) -> Listing | None:
    """A dataset from the files of ``datasets.save_to_disk`` or from the Parquet files of its repository; None if there are none.

    The image column is the one that holds ``bytes``; the label column is called ``label``, ``labels`` or ``fine_label``. Class
    names are taken from the files where they have any, else labels are those of torchvision's order.

    Args:
        folder: with ``dataset_dict.json``, or with ``train-*.parquet`` and ``test-*.parquet`` in it or in ``data``.
        classes: of the dataset.

    Raises:
        DataError: PyArrow is not installed, a split is missing, or a file is cut off or has other columns.
    """
    files = _files(folder)
    if not files:
        return None
    missing = sorted({"train", "test"} - set(files))
    if missing:
        raise DataError(f"{folder} has tables for {', '.join(sorted(files))} but none for {missing[0]}")
    parts: dict[str, ImageSource] = {}
    for part, names in files.items():
        parts[part] = _part(folder, names, classes)
        require_all_classes(parts[part], classes, f"{folder}, {part},")
    return Listing("Hugging Face", folder, parts)


def _files(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if (folder / "dataset_dict.json").is_file():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name in SPLIT_NAMES:
                found[SPLIT_NAMES[path.name]] = _arrow_files(folder, path)
        return found
    for place in (folder, folder / "data"):
        for path in sorted(place.glob("*.parquet")) if place.is_dir() else []:
            split = path.name.partition("-")[0].partition(".")[0]
            if split in SPLIT_NAMES:
                found.setdefault(SPLIT_NAMES[split], []).append(path.relative_to(folder).as_posix())
    return found


def _arrow_files(folder: Path, split: Path) -> list[str]:
    state = split / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} is missing or damaged ({error!r}); save the dataset again") from error
    lost = [name for name in names if not (split / name).is_file()]
    if lost:
        raise DataError(f"{state} names {split / lost[0]}, which is not there; copy the dataset again")
    return [(split / name).relative_to(folder).as_posix() for name in names]


def _part(folder: Path, names: list[str], classes: Classes) -> TableImages:
    tables = [_table(folder / name) for name in names]
    schema, where = tables[0].schema, folder / names[0]
    arrow = _arrow()
    images = [
        field.name for field in schema if arrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    labels = [name for name in ("label", "labels", "fine_label") if name in schema.names]
    if len(images) != 1 or not labels:
        raise DataError(
            f"{where}: expected one image column and a column label, labels or fine_label, found {', '.join(schema.names)}"
        )
    spelt = _class_names(schema, labels[0])
    order = classes.labels_in_order(spelt, where) if spelt else list(range(len(classes)))
    numbers = [number for table in tables for number in table.column(labels[0]).to_pylist()]
    wrong = next((number for number in numbers if not isinstance(number, int) or not 0 <= number < len(order)), None)
    if wrong is not None:
        raise DataError(f"{where}: expected labels from 0 to {len(order) - 1}, got {wrong}")
    return TableImages(folder, names, images[0], torch.tensor([order[number] for number in numbers], dtype=torch.int64))


def _class_names(schema: Any, column: str) -> list[str]:
    """Names of a ``ClassLabel`` column, from the metadata that `datasets` writes into its files."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return (features.get(column) or {}).get("names") or []


def _table(path: Path) -> Any:
    arrow = _arrow()
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path)
        with arrow.memory_map(str(path)) as mapped:
            return arrow.ipc.open_stream(mapped).read_all()
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is cut off or damaged ({error}); copy it again") from error


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            "Hugging Face datasets on disk are read with PyArrow, which is not installed: pip install pyarrow"
        ) from error
    return pyarrow

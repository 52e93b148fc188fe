"""Hugging Face tables on disk; the files are written with PyArrow in the form that `datasets` gives them."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import pickle
from pathlib import Path

import pytest
from miniatures import SIZES, paint, rows, spelt

from cl_methods.datasets.find import SplitOptions, find_dataset
from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import classes

NAME = "DTD"


def find(root: Path):
    return find_dataset(DATASETS[NAME], root, SplitOptions(sizes="any"))


def write_tables(root: Path, kind: str) -> Path:
    """Two files per split; labels count in the reverse of our order, as the table's own class names say."""
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    names = classes(NAME, "zscl").names[::-1]
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema = arrow.schema([("image", image), ("label", arrow.int64())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder = root / DATASETS[NAME].copies[0]
    for part in ("train", "test"):
        files = []
        for shard in range(2):
            content = []
            for _, label, _, number in rows(NAME, part)[shard::2]:
                buffer = io.BytesIO()
                paint(label, number).save(buffer, "PNG")
                content.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": len(names) - 1 - label})
            table = arrow.Table.from_pylist(content, schema=schema)
            if kind == "parquet":
                (folder / "data").mkdir(parents=True, exist_ok=True)
                parquet.write_table(table, folder / "data" / f"{part}-{shard:05d}-of-00002.parquet")
                continue
            (folder / part).mkdir(parents=True, exist_ok=True)
            files.append({"filename": f"data-{shard:05d}-of-00002.arrow"})
            file = str(folder / part / files[-1]["filename"])
            with arrow.OSFile(file, "wb") as sink, arrow.ipc.new_stream(sink, schema) as writer:
                writer.write_table(table)
        if kind == "arrow":
            (folder / part / "state.json").write_text(json.dumps({"_data_files": files, "_split": part}))
    if kind == "arrow":
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


@pytest.mark.pyarrow
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_tables(kind, tmp_path):
    write_tables(tmp_path, kind)
    found, count = find(tmp_path), len(classes(NAME, "zscl"))
    assert found.layout == "Hugging Face"
    assert (len(found.task.train), len(found.task.test)) == (SIZES["train"] * count, SIZES["test"] * count)
    for source in (found.task.train, found.task.test):
        assert [spelt(source.image(index)) for index in range(len(source))] == source.labels.tolist()
    again = pickle.loads(pickle.dumps(found.task.train))
    assert again.fingerprint() == found.task.train.fingerprint()
    assert find(tmp_path).fingerprint() == found.fingerprint()


@pytest.mark.pyarrow
def test_damaged_tables(tmp_path):
    folder = write_tables(tmp_path, "arrow")
    file = folder / "test" / "data-00001-of-00002.arrow"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is cut off or damaged"):
        find(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"state\.json names .*data-00001-of-00002\.arrow, which is not there"):
        find(tmp_path)
    (folder / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"test/state\.json is missing or damaged"):
        find(tmp_path)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = tmp_path / DATASETS[NAME].copies[0]
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}-00000-of-00001.parquet").write_bytes(b"PAR1")
    found = builtins.__import__

    def missing(name, *rest, **named):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match="PyArrow, which is not installed: pip install pyarrow"):
        find(tmp_path)


def test_a_split_without_tables(tmp_path):
    folder = tmp_path / DATASETS[NAME].copies[0]
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"DTD has tables for train but none for test"):
        find(tmp_path)

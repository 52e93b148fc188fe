"""Files made to do harm: run directories, weights, datasets and caches. Each is refused or harmless."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_methods.components import teacher_features
from cl_methods.datasets.archives import parts
from cl_methods.datasets.binary import read_cifar_pickle
from cl_methods.datasets.images import DataError, FileImages
from cl_methods.datasets.sources import TarImages
from cl_methods.training.checkpoints import RunDirectory, TrainingProgress
from cl_methods.training.checkpoints.restoring import restore
from cl_methods.training.export import read_adapter
from cl_methods.weights import read_weights

ROWS = {
    "zero_shot": [50.0, 60.0],
    "accuracy": [],
    "calibration_error": [],
    "seconds": [],
    "reliability": [],
    "further": {},
}


class Payload:
    """What makes a pickle run a command when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.canary)],)


@pytest.fixture
def canary(tmp_path):
    """A file that appears if something is executed, and must not."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from a file was executed"


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.fixture
def directory(tmp_path):
    """A run with one good checkpoint after one step and one after two, of two tasks."""
    (tmp_path / "run").mkdir()
    directory = RunDirectory(tmp_path / "run")
    directory.write_json("rows.json", ROWS)
    for step in (1, 2):
        directory.save(0, step, {"weight": torch.full((3,), float(step))}, {}, TrainingProgress([1.0]), rows=ROWS)
    return directory


def replace(directory: RunDirectory, name: str, content: bytes) -> None:
    """Another content of a file of the newest checkpoint, with the checksum that it should have."""
    folder = directory.found()[-1].path
    (folder / name).write_bytes(content)
    names = ("model.safetensors", "state.pt", "rows.json")
    lines = [f"{hashlib.sha256((folder / each).read_bytes()).hexdigest()}  {each}\n" for each in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def passed_over(directory: RunDirectory) -> str:
    """The sentence about the newest checkpoint, after making sure that the older one was taken."""
    restored = restore(directory, 2)
    assert restored.checkpoint is not None
    assert restored.checkpoint.step == 1
    assert torch.equal(restored.method_state["weight"], torch.ones(3))
    assert len(restored.sentences) == 1
    return restored.sentences[0]


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def test_both_checkpoints_are_good_to_begin_with(directory):
    assert restore(directory, 2).checkpoint.step == 2


def test_a_checkpoint_that_would_run_a_command(directory, canary):
    replace(directory, "state.pt", saved({"optimizer": Payload(canary), "progress": {}}))
    assert "holds more than tensors and plain values, so it is not read" in passed_over(directory)


def test_a_checkpoint_that_is_a_bare_pickle(directory, canary):
    replace(directory, "state.pt", pickle.dumps(Payload(canary)))
    assert "it is not read" in passed_over(directory)


def test_a_checkpoint_of_other_plain_values(directory):
    replace(directory, "state.pt", saved({"optimizer": {}, "progress": {"__class__": 1}}))
    assert "state.pt cannot be read" in passed_over(directory)


LYING = {"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
NEGATIVE = {"weight": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}
HEADERS = {
    "says that there are four terabytes": safetensors(LYING, bytes(16)),
    "is said to be larger than memory": safetensors({}, length=2**62),
    "is said to be a hundred million bytes": safetensors({}, length=99_999_999),
    "has negative sizes": safetensors(NEGATIVE, bytes(16)),
    "is nested a million deep": safetensors(b"[" * 1_000_000),
    "is a pickle": pickle.dumps({"weight": 1}),
    "is empty": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_tensors_whose_header(directory, content):
    replace(directory, "model.safetensors", content)
    assert "model.safetensors cannot be read" in passed_over(directory)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "state.pt/../../../secret"])
def test_checksums_that_name_files_outside(directory, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    sums = directory.found()[-1].path / "SHA256SUMS"
    sums.write_text(f"{sums.read_text()}{'0' * 64}  {name}\n")
    assert "does not list" in passed_over(directory)


def test_rows_that_are_nested_too_deep(directory):
    (directory.path / "rows.json").write_text("[" * 200_000)
    restored = restore(directory, 2)
    assert restored.checkpoint.step == 2
    assert "rows.json cannot be read" in restored.sentences[0]


def test_checkpoints_that_are_a_link_to_elsewhere_are_not_deleted(directory, tmp_path):
    directory.write_json("run.json", {})
    outside = tmp_path / "precious"
    directory.checkpoints.rename(outside)
    directory.checkpoints.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        directory.prepare(overwrite=True)
    assert len(list(outside.iterdir())) == 2


def test_weights_that_would_run_a_command(canary, tmp_path):
    for content in (saved({"state_dict": Payload(canary)}), pickle.dumps(Payload(canary))):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pt (holds more than tensors|cannot be read)"):
            read_weights(tmp_path / "w.pt")


def test_an_array_of_objects_in_place_of_weights(canary, tmp_path):
    np.save(tmp_path / "w.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"w\.npy"):
        read_weights(tmp_path / "w.npy")


def test_an_adapter_file_with_a_lying_header(tmp_path):
    from cl_methods.training.export import ADAPTER, ADAPTER_CONFIG, FORMAT, Adapter

    values = dict.fromkeys(Adapter.__dataclass_fields__)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"format": FORMAT, "version": 1, **values}))
    (tmp_path / ADAPTER).write_bytes(HEADERS["says that there are four terabytes"])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_adapter(tmp_path)


def test_a_dataset_that_would_run_a_command(canary, tmp_path):
    (tmp_path / "train").write_bytes(pickle.dumps({"data": Payload(canary)}, protocol=2))
    with pytest.raises(DataError, match="which no image needs"):
        read_cifar_pickle(tmp_path / "train")


def tar(path: Path, *entries: tuple[str, bytes, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, len(content)
            entry.linkname = "/etc/hostname" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(entry, io.BytesIO(content))


def test_an_archive_writes_nothing_and_follows_no_link(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ("../outside.cls", "/tmp/cl_kernels_outside.cls", "a/../../outside.cls")
    files = [(name, tarfile.REGTYPE, b"7") for name in names]
    links = [("link.cls", tarfile.SYMTYPE, b""), ("hard.cls", tarfile.LNKTYPE, b""), ("dev.cls", tarfile.CHRTYPE, b"")]
    tar(folder / "shard.tar", *files, *links)
    before = sorted(tmp_path.rglob("*"))
    read = list(parts(folder / "shard.tar", "shard.tar", frozenset({".cls"})))
    assert [part.content for part in read] == [b"7"] * 3, "links and devices are not files"
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/cl_kernels_outside.cls").exists()


def test_an_archive_whose_member_is_said_to_be_huge(tmp_path):
    tar(tmp_path / "shard.tar", ("a.cls", tarfile.REGTYPE, b"7"))
    content = bytearray((tmp_path / "shard.tar").read_bytes())
    entry = tarfile.TarInfo("a.cls")
    entry.size = 8 * 2**30 - 1
    content[:512] = entry.tobuf(tarfile.USTAR_FORMAT)[:512]
    (tmp_path / "shard.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"is cut off"):
        list(parts(tmp_path / "shard.tar", "shard.tar", frozenset({".cls"})))


def png_of(width: int, height: int) -> bytes:
    """A PNG file of a hundred bytes that claims to be of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_an_image_that_would_fill_the_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(100_000, 100_000))
    with pytest.raises(DataError, match=r"bomb\.png is not a readable image .*decompression bomb"):
        FileImages(tmp_path, ["bomb.png"], torch.zeros(1, dtype=torch.int64)).image(0)
    tar(tmp_path / "shard.tar", ("bomb.png", tarfile.REGTYPE, png_of(100_000, 100_000)))
    (part,) = parts(tmp_path / "shard.tar", "shard.tar", frozenset())
    with pytest.raises(DataError, match="decompression bomb"):
        TarImages(tmp_path, [part.member], torch.zeros(1, dtype=torch.int64)).image(0)


def test_cached_features_with_a_lying_header(tmp_path):
    header = teacher_features._HEADER.pack(bytes(32), 2**32 - 1, 2**32 - 1, 0, 0)
    (tmp_path / "a.batches").write_bytes(header + bytes(64))
    assert teacher_features._read(tmp_path / "a.batches", 0) is None

"""Features of a frozen model on reference texts and images, kept on disk between runs; the same bits as computed anew."""

from __future__ import annotations

import hashlib
import os
import platform
import struct
import uuid
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.datasets.cache_folder import CacheEntry, CacheFolder
from cl_methods.datasets.image_cache import decoder_versions
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.two_stage import two_stage

FORMAT = 1
_FILE = "features.bin"
_HEADER = struct.Struct("<32sIIII")
"""Digest of the batch, rows, columns, number of the dtype, CRC-32 of the features."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WRITES_PER_LOOK = 64


class TeacherFeatures:
    """What one frozen model makes of texts and images, kept in a cache folder.

    The key is everything that decides the bits: weights, architecture, token ids or images and their transform, and the versions,
    device and threads that they are computed with. What was computed elsewhere is therefore not used here.

    Args:
        folder: where to keep them.
        teacher: whose weights never change.
    """

    def __init__(self, folder: CacheFolder, teacher: Backbone) -> None:
        self.folder, self.teacher = folder, teacher
        self._model: dict[str, Any] | None = None

    def texts(self, tokens: Tensor) -> Tensor:
        """``teacher.frozen_text_features(tokens)``.

        Args:
            tokens: (N, L) int64 on the CPU.

        Returns:
            (N, d) on the teacher's device.
        """
        ids = hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
        description = {**self._description("texts"), "tokens": ids, "shape": list(tokens.shape)}
        computed: list[Tensor] = []

        def make(place: Path) -> dict[str, Any]:
            computed.append(self.teacher.frozen_text_features(tokens))
            self.folder.require_room()
            content = _content(computed[0])
            (place / _FILE).write_bytes(content)
            return {"files": {_FILE: len(content)}}

        for _ in range(2):
            entry = self.folder.entry("features", description, make)
            if computed:
                return computed[0]
            if entry is None:
                break
            found = _read(entry.place / _FILE, 0)
            if found is not None:
                return found[1].to(self.teacher.device)
            self.folder.discard(entry.place, f"{entry.place / _FILE} is damaged")
        return self.teacher.frozen_text_features(tokens)

    def images(self, source: ImageSource) -> KeptBatches | None:
        """Features of images of ``source`` through the teacher's evaluation transform; None if that draws random numbers."""
        stages = two_stage(self.teacher.eval_transform)
        if stages is None or not len(source):
            return None
        description = {
            **self._description("images"),
            "images": source.location() or source.fingerprint(),
            "transform": [stages.pixels_key, stages.numbers_key],
            "decoder": decoder_versions(),
        }
        entry = self.folder.entry("features", description)
        return None if entry is None else KeptBatches(entry, self.folder, source)

    def _description(self, kind: str) -> dict[str, Any]:
        if self._model is None:
            self._model = {
                "format": FORMAT,
                "weights": weights_fingerprint(self.teacher.model),
                "architecture": hashlib.sha256(repr(self.teacher.model).encode()).hexdigest(),
                "computed with": _arithmetic(self.teacher.device),
            }
        return {**self._model, "kind": kind}


class KeptBatches:
    """Features of batches of images, by which images they are, in which order and in which state their files are.

    A row depends in its last bits on the batch it was computed in, so whole batches are kept: runs that draw the same reference
    batches, as those with one seed and batch size do, share them. Every process adds to a file of its own, which others
    read when they start; a record that a killed process left cut off ends its file.

    Args:
        entry: where the files are.
        folder: that the entry belongs to.
        source: of the images.
    """

    def __init__(self, entry: CacheEntry, folder: CacheFolder, source: ImageSource) -> None:
        self.entry, self.folder, self.source = entry, folder, source
        self._own = entry.place / f"{uuid.uuid4().hex}.batches"
        self._known: dict[bytes, tuple[Path, int]] = {}
        self._writes = 0 if entry.writable else -1
        for path in sorted(entry.place.glob("*.batches"), key=_modified):
            self._scan(path)  # the newest counts: it may replace what is damaged in an older one

    def get(self, indices: list[int], compute: Callable[[], Tensor]) -> Tensor:
        """Features (B, d) of the images at ``indices``, from disk or from ``compute()``, which is then kept.

        Where several processes compute together, all read or all compute, and the first one keeps.
        """
        state = b"".join(struct.pack("<qQ", index, self.source.stamp(index)) for index in indices)
        key = hashlib.sha256(state).digest()
        found = self._find(key, len(indices))
        if ranks.everyone(found is not None) and found is not None:
            return found
        features = compute()
        if ranks.first():
            self._write(key, features)
        return features

    def _find(self, key: bytes, rows: int) -> Tensor | None:
        if key not in self._known:
            return None
        path, place = self._known[key]
        found = _read(path, place)
        if found is not None and found[0] == key and len(found[1]) == rows:
            return found[1]
        self.folder.say(f"{path} is damaged; features in it are computed again")
        return None

    def _scan(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            place = 0
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                key, rows, columns, kind, _ = _HEADER.unpack(header)
                if kind >= len(_DTYPES) or (end := file.tell() + rows * columns * _DTYPES[kind].itemsize) > size:
                    return
                self._known[key] = (path, place)
                place = end
                file.seek(end)

    def _write(self, key: bytes, features: Tensor) -> None:
        if self._writes < 0:
            return
        try:
            if self._writes % _WRITES_PER_LOOK == 0:
                self.folder.require_room()
            self._writes += 1
            with self._own.open("ab") as file:
                place = file.seek(0, os.SEEK_END)
                file.write(_content(features, key))
            self._known[key] = (self._own, place)
        except OSError as error:
            self._writes = -1
            self.folder.say(f"features of reference images are not kept any further ({error})")


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


def weights_fingerprint(model: torch.nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of everything in a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _arithmetic(device: torch.device) -> list[str]:
    """What the last bits of a product depend on, besides its factors."""
    on_gpu = device.type == "cuda"
    where = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    # Not torch.get_float32_matmul_precision, which is refused once somebody has set one of these.
    mkldnn: Any = torch.backends.mkldnn  # whose parts type checkers do not see
    of_products = torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision
    fewer = sorted(set(of_products) - {"none", "ieee"})
    precision = ["+".join(fewer) or "highest", str(of_products[0] == "tf32" and on_gpu)]
    versions = [torch.__version__, metadata.version("open_clip_torch"), str(torch.version.cuda)]
    shares = [f"shares of {ranks.count()} processes"] if ranks.count() > 1 else []
    threads = [] if on_gpu else [f"{torch.get_num_threads()} threads", _processor()]
    return [where, *versions, *precision, *threads, *shares]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _content(features: Tensor, key: bytes = bytes(32)) -> bytes:
    """A record: header and features (N, d)."""
    values = features.detach().cpu().contiguous()
    content = values.flatten().view(torch.uint8).numpy().tobytes()
    return _HEADER.pack(key, *values.shape, _DTYPES.index(values.dtype), zlib.crc32(content)) + content


def _read(path: Path, place: int) -> tuple[bytes, Tensor] | None:
    """Key and features (N, d) of the record at ``place``; None if it is not whole."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            key, rows, columns, kind, check = _HEADER.unpack(file.read(_HEADER.size))
            size = rows * columns * _DTYPES[kind].itemsize
            if size > path.stat().st_size:
                return None
            content = bytearray(file.read(size))
    except (OSError, struct.error, IndexError):
        return None
    if len(content) != rows * columns * _DTYPES[kind].itemsize or zlib.crc32(content) != check or not content:
        return None
    return key, torch.frombuffer(content, dtype=_DTYPES[kind]).view(rows, columns)

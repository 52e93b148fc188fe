"""The seven tasks and the reference set as tensors: rendered once, cached in the user's cache folder, checked by fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.cache import cache_folder
from cl_methods.scenarios.mini.captions import mention, write
from cl_methods.scenarios.mini.generic import KINDS, SHARES, render
from cl_methods.scenarios.mini.stream import Stream
from cl_methods.scenarios.mini.tasks import ORDERS, TASKS, digits

VERSION = "mini-v1"
SIZES = {"train": 1000, "validation": 200, "test": 1000}
DIGIT_SIZES = {"train": 900, "validation": 100, "test": 797}
REFERENCE_SIZE = 2000
_TASK_SEED, _REFERENCE_SEED, _DIGIT_SEED = 101, 202, 303
"""First part of every stream's key; pre-training draws from another (see ``pretrain``)."""

FINGERPRINT: dict[str, str] = json.loads((Path(__file__).parent / "fingerprints.json").read_text())
"""sha256 of every split (as :meth:`TensorImages.fingerprint` has it), of the captions, and of the checkpoint file."""


class FingerprintError(RuntimeError):
    """Rendered data differ from what the package was published with."""


def _split_digits() -> dict[str, tuple[Tensor, Tensor]]:
    images, labels = digits()
    order = Stream(_DIGIT_SEED).permutation(len(images))
    splits, start = {}, 0
    for split, size in DIGIT_SIZES.items():
        chosen = order[start : start + size]
        splits[split] = (torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]))
        start += size
    return splits


def _render_task(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    spec = TASKS[name]
    if spec.render is None:
        return _split_digits()
    splits = {}
    for number, (split, size) in enumerate(SIZES.items()):
        stream = Stream(_TASK_SEED, tuple(TASKS).index(name), number)
        labels = (np.arange(size) % len(spec.class_names))[stream.permutation(size)]
        blocks = [spec.render(block, stream) for block in np.array_split(labels, max(1, size // 100))]
        splits[split] = (torch.from_numpy(np.concatenate(blocks)), torch.from_numpy(labels))
    return splits


def render_reference() -> tuple[Tensor, tuple[str, ...], Tensor]:
    """The reference set from the generic renderer: images (2000, 3, 32, 32) uint8, one caption each, facts (2000, 7) int64."""
    stream = Stream(_REFERENCE_SEED)
    images, facts = [], []
    for _ in range(REFERENCE_SIZE // 100):
        block, shown, _ = render({kind: round(100 * SHARES[kind]) for kind in KINDS}, stream)
        images.append(block)
        facts.append(shown)
    shown = np.concatenate(facts)
    captions = write(mention(shown, stream), stream)
    return torch.from_numpy(np.concatenate(images)), tuple(captions), torch.from_numpy(shown)


def render_all() -> dict[str, Tensor]:
    """Everything, rendered: ``TASK/SPLIT/images`` and ``/labels``, ``reference/images`` and ``reference/captions`` (bytes)."""
    tensors = {}
    for name in TASKS:
        for split, (images, labels) in _render_task(name).items():
            tensors[f"{name}/{split}/images"], tensors[f"{name}/{split}/labels"] = images, labels
    images, captions, _ = render_reference()
    tensors["reference/images"] = images
    tensors["reference/captions"] = torch.frombuffer(bytearray("\n".join(captions).encode()), dtype=torch.uint8)
    return tensors


def fingerprints(tensors: dict[str, Tensor]) -> dict[str, str]:
    """sha256 of each split of :func:`render_all`'s result, of the reference images and of the captions."""
    result = {}
    for name in TASKS:
        for split in SIZES:
            source = TensorImages(tensors[f"{name}/{split}/images"], tensors[f"{name}/{split}/labels"])
            result[f"{name}/{split}"] = source.fingerprint()
    result["reference/images"] = TensorImages(tensors["reference/images"]).fingerprint()
    result["reference/captions"] = hashlib.sha256(tensors["reference/captions"].numpy().tobytes()).hexdigest()
    return result


def _differences(tensors: dict[str, Tensor]) -> list[str]:
    found = fingerprints(tensors)
    return [name for name, value in found.items() if value != FINGERPRINT.get(name)]


def cache_file() -> Path:
    """The file of the rendered world; its name ends in a digest of all fingerprints, so versions do not overwrite each other."""
    digest = hashlib.sha256(json.dumps(FINGERPRINT, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{VERSION}-{digest[:12]}.safetensors"


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        wrong = _differences(tensors)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        warnings.warn(f"{path} does not hold {VERSION} ({', '.join(wrong)}); rendering it again", stacklevel=4)
        return None
    return tensors


def _write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        os.close(descriptor)
        try:
            save_file(tensors, temporary)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"cannot keep the mini world in {path} ({error}); it is rendered again each time", stacklevel=4)


def _tensors() -> dict[str, Tensor]:
    path = cache_file()
    tensors = _read_cache(path)
    if tensors is None:
        tensors = render_all()
        wrong = _differences(tensors)
        if wrong:
            raise FingerprintError(
                f"the mini world rendered here differs from {VERSION} in {', '.join(wrong)}; "
                "results would not be comparable. Please report the processor and the versions of numpy and scikit-learn"
            )
        _write_cache(path, tensors)
    return tensors


def load_scenario(order: str = "I") -> Scenario:
    """The mini world's seven tasks, with its reference set.

    Args:
        order: "I" or "II".

    Returns:
        A scenario named "mini". Images are uint8 (N, 3, 32, 32): 1,000 training, 200 validation and 1,000 test images a task;
        the digits have 900, 100 and 797. Rendered on first use and kept in :func:`~cl_methods.scenarios.cache.cache_folder`.

    Raises:
        ValueError: ``order`` is neither.
        FingerprintError: this machine renders other pixels than were published.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    tensors = _tensors()
    tasks = []
    for name in ORDERS[order]:
        sources = [
            TensorImages(tensors[f"{name}/{split}/images"], tensors[f"{name}/{split}/labels"]) for split in SIZES
        ]
        tasks.append(Task(name, TASKS[name].class_names, TASKS[name].templates, *sources))
    captions = tuple(bytes(tensors["reference/captions"].tolist()).decode().split("\n"))
    reference = Reference(TensorImages(tensors["reference/images"]), captions)
    return Scenario("mini", order, tuple(tasks), reference, {"version": VERSION})

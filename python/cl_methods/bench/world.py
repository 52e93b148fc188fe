"""A few tasks and a model to take training steps on: the embedded tiny one, or an open_clip model's shapes without its memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone, load_backbone
from cl_methods.backbone.open_clip_loading import untrained_open_clip
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.task import Reference, Task
from cl_methods.datasets.texts import classes
from cl_methods.scenarios.mini import concepts

CAPTIONS = 15_840
"""Rows of the Conceptual Captions validation set, which the published ZSCL distils against."""

_IMAGES = 128

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """What steps are taken on.

    Attributes:
        model: `mini` or an open_clip name.
        tasks: at least one, of noise images with real class names.
        reference: noise images, and as many captions as asked for.
        image_size: pixels along a side.
        shapes: tensors have shapes and no values, so that steps of any size can be counted on any machine.
    """

    model: str
    tasks: tuple[Task, ...]
    reference: Reference
    image_size: int
    shapes: bool
    _network: Backbone

    def backbone(self) -> Backbone:
        """A fresh copy of the model, the same every time."""
        source = self._network
        with warnings.catch_warnings():  # copying asks a fake tensor for the address that it does not have
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            network = copy.deepcopy(source.model)
        transforms = source.train_transform, source.eval_transform
        return Backbone(network, source.tokenize, *transforms, device=source.device, name=self.model)


def mini_world(captions: int = 200, device: torch.device = CPU, *, task_count: int = 2, class_count: int = 10) -> World:
    """The pre-trained tiny model on ``device`` with tasks of its own classes; everything has values.

    Args:
        captions: number of reference captions.
        device: where the model is.
        task_count, class_count: tasks, and classes of each; 144 classes in all at most.

    Raises:
        ValueError: there are not so many classes.
    """
    names = [f"{colour} {shape}" for shape in concepts.SHAPES for colour in concepts.COLOURS]
    if not 0 < task_count * class_count <= len(names):
        raise ValueError(f"expected 1 to {len(names)} classes in all, got {task_count} tasks of {class_count}")
    network = load_backbone("mini", device=device)
    starts = range(0, task_count * class_count, class_count)
    tasks = tuple(
        _task(f"task{index}", names[start : start + class_count], ("a photo of a {}.",), 32, index)
        for index, start in enumerate(starts)
    )
    texts = tuple(f"a photo of a {names[row % len(names)]}." for row in range(captions))
    return World("mini", tasks, Reference(_noise(_IMAGES, 32, 9), texts), 32, False, network)


def open_clip_world(
    model: str, captions: int = CAPTIONS, *, shapes: bool = True, class_count: int = 100, device: torch.device = CPU
) -> World:
    """An open_clip model with random weights and the classes of Aircraft and DTD.

    Args:
        model: open_clip name.
        captions: number of reference captions.
        shapes: tensors without values; with them the weights take their memory.
        class_count: at most so many classes of a task.
        device: where the model is.

    Raises:
        ValueError: the name is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = untrained_open_clip(model)
    network: Any = parts[0]
    if shapes:
        network = without_values(network)
    backbone = Backbone(network, *parts[1:], device=device, name=model)
    size = network.visual.image_size
    size = size if isinstance(size, int) else size[0]
    tasks = []
    for index, name in enumerate(("Aircraft", "DTD")):
        texts = classes(DATASETS[name].name, "zscl")
        tasks.append(_task(name, list(texts.names)[:class_count], texts.templates, size, index))
    # Not one caption many times: its softmax would be uniform, its gradient zero, and a comparison of rounding errors alone.
    dogs = tuple(f"a photo of dog number {row}" for row in range(captions))
    reference = Reference(_noise(_IMAGES, size, 9), dogs)
    return World(model, tuple(tasks), reference, size, shapes, backbone)


def without_values(module: nn.Module) -> nn.Module:
    """``module`` with fake tensors for weights and buffers, in place: shapes, dtypes and devices, no memory.

    The logarithm of the temperature keeps its value, which methods read. Moving the module elsewhere does nothing.
    """
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and name != "logit_scale" and not is_fake(weight):
                part._parameters[name] = nn.Parameter(_fake().from_tensor(weight.detach()), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and not is_fake(buffer):
                part._buffers[name] = _fake().from_tensor(buffer)
    kind = type(module)
    # nn.Module.to exchanges tensors, which fake ones do not allow.
    module.__class__ = type(kind.__name__, (kind,), {"to": lambda self, *_, **__: self})
    return module


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor of any shape has no values."""
    return getattr(tensor, "fake_mode", None) is not None


@contextmanager
def fresh(shapes: bool) -> Iterator[None]:
    """Inside, tensors made from nothing have no values either, if ``shapes``."""
    if not shapes:
        yield
        return
    with _fake():
        yield


@cache
def _fake() -> Any:
    """The one mode of all tensors without values, of a module that loads torch's compiler."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _task(name: str, names: list[str], templates: tuple[str, ...], size: int, seed: int) -> Task:
    train, validation, test = (_noise(_IMAGES, size, 10 * seed + part, len(names)) for part in range(3))
    return Task(name, tuple(names), templates, train, validation, test)


def _noise(count: int, size: int, seed: int, class_count: int = 1) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return TensorImages(pixels, torch.arange(count) % class_count)

"""Suite ``evaluation``: FLOPs of one whole MTIL evaluation, ours beside the public procedures, and the speed of reading images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_methods.backbone import Backbone
from cl_methods.bench.counting import FORMULAS
from cl_methods.bench.decoding import decoding_rows
from cl_methods.bench.rows import Row
from cl_methods.bench.world import World, fresh, open_clip_world, without_values
from cl_methods.components.adapters import MountedAdapters
from cl_methods.components.ddas import AutoEncoder
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import Classes, Family, classes
from cl_methods.scenarios.mtil import ORDERS

PUBLIC = "public procedure"
FAMILY: Family = "zscl"
EVALUATED = ORDERS["I"]
_CODE, _ALEXNET = 100, 256 * 13 * 13


@dataclass(frozen=True)
class Texts:
    """What encoding class prompts took.

    Attributes:
        calls: passes through the text tower.
        flops: of all of them.
    """

    calls: int
    flops: int


def evaluation_suite(model: str, note: Callable[[str], None] = lambda _: None, *, time: bool = False) -> list[Row]:
    """Rows for a model that is trained as a whole (ZSCL) and for MoE-Adapters after its last task.

    Eleven datasets, their 1,201 classes, 8,648 prompts and 97,209 test images of the family ``zscl``. Public: every class in
    a call of its own at full context length, and for MoE-Adapters with every of the 12 routers, the plain model included.
    Ours: prompts together, of all datasets or of those that share a router, common beginnings computed once.

    Args:
        model: open_clip name.
        note: told what is being done.
        time: whether images are read too, against a clock.

    Raises:
        ValueError: the name is unknown.
        CheckError: the image cache gives other pixels than the transform.
    """
    world = open_clip_world(model, 0)
    tables = {name: classes(name, FAMILY) for name in EVALUATED}
    images = sum(int(DATASETS[name].sizes[FAMILY][2]) for name in EVALUATED)
    prompts = {name: len(table) * len(table.templates) for name, table in tables.items()}
    class_count = sum(len(table) for table in tables.values())
    note("class prompts of the whole model")
    backbone = world.backbone()
    plain, plain_image = _embed(backbone, [tables]), _image_flops(backbone, world)
    one = _full_length(backbone)
    case = (
        f"ZSCL, {model}, one checkpoint: {class_count:,} classes, {sum(prompts.values()):,} prompts, {images:,} images"
    )
    rows = [
        _row(case, "ours", plain, images * plain_image),
        _row(case, PUBLIC, Texts(class_count, one * sum(prompts.values())), images * plain_image),
    ]
    note("class prompts through adapters")
    adapters = MountedAdapters(backbone, experts=22)
    without_values(adapters)
    with fresh(True):
        for block in adapters.each():
            block.add_routers(1)
    with adapters.active(0):
        routed = _embed(backbone, [{name: table} for name, table in tables.items()])
        every, routed_image = _embed(backbone, [tables]), _image_flops(backbone, world)
        routed_one = _full_length(backbone)
    routers = len(EVALUATED)
    everything = Texts((routers + 1) * class_count, (routers * routed_one + one) * sum(prompts.values()))
    image_flops = images * (routed_image + _detector_flops(world, routers + 1))
    case = f"MoE-Adapters, {model}, the last of {routers} checkpoints"
    rows += [
        _row(f"{case}, every dataset through its own router", "ours", routed, image_flops),
        _row(f"{case}, every dataset through its own router", PUBLIC, everything, image_flops),
        _row(
            f"{case}, images of every dataset through every router",
            "ours",
            Texts(routers * every.calls + plain.calls, routers * every.flops + plain.flops),
            image_flops,
        ),
        _row(f"{case}, images of every dataset through every router", PUBLIC, everything, image_flops),
    ]
    if time:
        note("reading images")
        rows += decoding_rows(backbone.eval_transform)
    return rows


def _row(case: str, implementation: str, texts: Texts, image_flops: int) -> Row:
    return Row(case, implementation, {"text_calls": texts.calls, "text_flops": texts.flops, "image_flops": image_flops})


def _embed(backbone: Backbone, groups: list[dict[str, Classes]]) -> Texts:
    """The library's own class embeddings of every dataset, those of a group together."""
    with _counted_calls(backbone) as calls, FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        for tables in groups:
            backbone.class_embeddings_of([(table.names, table.templates) for table in tables.values()])
    return Texts(len(calls), counter.get_total_flops())


@contextmanager
def _counted_calls(backbone: Backbone) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what goes through the text tower."""
    shapes: list[tuple[int, ...]] = []
    tower = backbone.text_tower.transformer
    handle = tower.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


@torch.no_grad()
def _full_length(backbone: Backbone) -> int:
    """FLOPs of one prompt at the full context length."""
    tokens = backbone.tokenize(["a photo of a dog."])
    return _flops(lambda: backbone.model.encode_text(tokens))


@torch.no_grad()
def _image_flops(backbone: Backbone, world: World) -> int:
    """FLOPs of one image."""
    images = _images(world)
    return _flops(lambda: backbone.encode_images(images))


@torch.no_grad()
def _detector_flops(world: World, coders: int) -> int:
    """FLOPs per image of the published detector: AlexNet's convolutions and one autoencoder per column."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        layers: Any = nn.Sequential(*list(alexnet().features.children())[:-2])
        coder = AutoEncoder(_ALEXNET, _CODE)
    images = torch.empty(1, 3, 224, 224, device="meta")
    return _flops(lambda: coder(layers(images).flatten(1))) + (coders - 1) * _flops(
        lambda: coder(torch.empty(1, _ALEXNET, device="meta"))
    )


def _images(world: World) -> Tensor:
    with fresh(True):
        return torch.empty(1, 3, world.image_size, world.image_size)


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()

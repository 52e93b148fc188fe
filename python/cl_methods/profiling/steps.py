"""A method's training step and the frozen model's forward pass on the same batch, as workloads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.profile import Workload
from cl_kernels.profile.layers import named_modules
from cl_methods.backbone import Backbone
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Method
from cl_methods.methods.find import find_method
from cl_methods.seeding import seed_everything

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Step:
    """What is profiled.

    Attributes:
        model: ``"mini"`` or an open_clip name; its weights are random but for ``mini``, since costs do not depend on them.
        method: name, or MODULE:CLASS.
        batch_size: images.
        classes: of the task whose texts are encoded.
        device: where; ``meta`` for shapes alone.
        settings: overrides of the method's settings for MTIL.
    """

    model: str
    method: str
    batch_size: int
    classes: int
    device: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("batch_size", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")


def workloads(step: Step) -> tuple[Workload, Workload, Method]:
    """(frozen forward pass, training step, the method), the second ready to be run any number of times.

    Raises:
        ValueError: model or method is unknown, the method has no training step, or it does not fit the model.
    """
    method_type = find_method(step.method)
    if not method_type.trains or method_type.closed_form:
        raise ValueError(
            f"method: {step.method} has no training step to profile: it "
            + ("is solved in closed form on features of the frozen model" if method_type.trains else "never trains")
        )
    settings = settings_for(method_type, step)
    names = _class_names(step)
    backbone = load(step.model, step.device)
    backbone.trims_last_block = (
        False  # as in the frozen pass beside it, so that differences are those of the method's own parts
    )
    try:
        method = method_type(backbone, settings, _reference())
    except TypeError as error:
        raise ValueError(f"{step.method} cannot be mounted on {step.model}: {error}") from error
    task, batch = _task(names), _batch(step, backbone)
    seed_everything(0)
    method.before_task(0, task)
    method.stage = method.stages(task)[0]
    method.before_stage(method.stage)
    batch = replace(batch, task=task, reference_images=batch.images if method.uses_reference else None,
                    reference_indices=torch.arange(step.batch_size) % 2 if method.uses_reference else None)  # fmt: skip
    optimizer = method.optimizer()
    texts = method.training_texts(task)

    def frozen() -> None:
        with torch.no_grad():
            backbone.encode_images(batch.images)
            backbone.encode_texts(texts, trimmed=True)

    def update() -> None:
        method.before_step(batch)
        optimizer.step()
        method.after_step(0)

    parts = named_modules(backbone.model)
    inputs = [batch.images, batch.labels, texts, *_state(backbone.model), *_state_of(method)]
    base = Workload(parts, inputs, frozen, samples=step.batch_size)
    adapted = Workload(
        parts | mounted(method), inputs, lambda: method.loss(batch)["loss"], update,
        true_share=_share(method), samples=step.batch_size,
    )  # fmt: skip
    return base, adapted, method


def load(model: str, device: str) -> Backbone:
    """A backbone with random weights, or shapes alone; ``mini`` has its own.

    Raises:
        ValueError: the model is unknown, or cannot be built here.
    """
    if model == "mini":
        from cl_methods.backbone import load_backbone

        backbone = load_backbone("mini")
        backbone = Backbone(
            backbone.model, backbone.tokenize, backbone.train_transform, backbone.eval_transform, name=model, device=device
        )  # fmt: skip
    else:
        from cl_methods.backbone.open_clip_loading import untrained_open_clip

        backbone = Backbone(*untrained_open_clip(model, device), name=model, device=device)
    if device == "meta":  # a number that methods read when they are made
        backbone.model.logit_scale = nn.Parameter(torch.tensor(4.6))
    backbone.model.requires_grad_(True)
    return backbone


def settings_for(method_type: type[Method], step: Step) -> Any:
    """The method's settings for MTIL with the overrides, and no detector that would need weights on disk.

    Raises:
        ValueError: a setting does not exist or has a wrong value.
    """
    from cl_methods.methods.settings import build_settings, scenario_settings

    settings = build_settings(method_type.Config, {**scenario_settings(method_type.name, "mtil"), **step.settings})
    if getattr(settings, "detection", None) == "ddas":  # it learns after the task; a step does not know it
        settings = replace(settings, ddas=replace(settings.ddas, features="backbone", augment=False))
    return settings


def mounted(method: Method) -> dict[str, nn.Module]:
    """{name: module} of what a method adds to its backbone: the modules among its attributes, and inside those."""
    own = {id(module) for module in method.backbone.model.modules()}
    found: dict[str, nn.Module] = {}
    for name, value in vars(method).items():
        if isinstance(value, nn.Module) and id(value) not in own:
            found[name] = value
            found |= {
                inner: module for inner, module in named_modules(value, f"{name}.").items() if id(module) not in own
            }
    return found


def _share(method: Method) -> float | None:
    experts = getattr(method.config, "experts", None)
    return None if experts is None else 1 / experts


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.buffers()
    yield from module.parameters()


def _state_of(method: Method) -> Iterator[Tensor]:
    """Tensors that a method carries, and those of other models among its attributes."""
    for value in vars(method).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Backbone) and value is not method.backbone:
            yield from _state(value.model)
        elif isinstance(value, dict):
            yield from (entry for entry in value.values() if isinstance(entry, Tensor))


def _task(names: tuple[str, ...]) -> Task:
    images = TensorImages(torch.zeros(len(names), 3, 32, 32, dtype=torch.uint8), torch.arange(len(names)))
    return Task("profiled", names, (TEMPLATE,), images, images, images)


def _class_names(step: Step) -> tuple[str, ...]:
    """Of two words each; the world of ``mini`` knows few."""
    if step.model != "mini":
        return tuple(f"class {number}" for number in range(step.classes))
    from cl_methods.scenarios.mini import concepts

    known = [f"{colour} {shape}" for shape in concepts.SHAPES for colour in concepts.COLOURS]
    if step.classes > len(known):
        raise ValueError(f"classes: expected up to {len(known)}, which mini has words for, got {step.classes}")
    return tuple(known[: step.classes])


def _reference() -> Reference:
    images = TensorImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    return Reference(images, ("a photo", "a picture"))


def _batch(step: Step, backbone: Backbone) -> Batch:
    size = getattr(backbone.model.visual, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    generator = torch.Generator().manual_seed(0)
    shape = (step.batch_size, 3, height, width)
    meta = step.device == "meta"
    images = torch.empty(shape, device="meta") if meta else torch.rand(shape, generator=generator).to(step.device)
    labels = torch.arange(step.batch_size) % step.classes
    return Batch(images, labels.to(step.device), 0, indices=labels)


def profile_name(method: Method, step: Step) -> str:
    """What headings and the headline call it."""
    config = method.config
    sizes = [
        (short, getattr(config, name, None)) for short, name in (("E", "experts"), ("k", "top_k"), ("r", "bottleneck"))
    ]
    shown = ", ".join(f"{short} = {value}" for short, value in sizes if value is not None)
    return f"{method.name}{f' ({shown})' if shown else ''} on {step.model}"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings that concern results and not costs are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""An image transform in two stages: the pixels it looks at, which can be kept, and the numbers it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cl_methods.datasets.images import RawImage

_TORCHVISION = "torchvision.transforms."
_GEOMETRY = {"Resize", "CenterCrop", "ToImage", "PILToTensor", "RGB"}
"""Steps of torchvision that are fixed functions of an image's pixels, wholly told by their ``repr``."""
_NUMBERS = {"ToDtype", "ConvertImageDtype", "Normalize", "ToPureTensor"}
"""Steps of torchvision that treat every pixel alike, so that many images can go through at once."""


@dataclass(frozen=True)
class TwoStage:
    """``numbers(pixels(image))``; an evaluation transform like any other when called.

    Attributes:
        pixels: PIL image or uint8 (3, H, W) -> uint8 (3, R, R): resizing and cropping, the same at every call.
        numbers: uint8 (…, 3, R, R) -> floating point of the same shape, element by element.
        pixels_key, numbers_key: what the stages are, in words: equal for equal functions, in every process.
        write_numbers: ``out.copy_(numbers(pixels))`` to the bit, for uint8 pixels (3, R, R) of NumPy and ``out`` (3, R, R) of the
            default dtype, without any tensor between them; None where there is nothing faster than :attr:`numbers`.
    """

    pixels: Callable[[RawImage], Tensor]
    numbers: Callable[[Tensor], Tensor]
    pixels_key: str
    numbers_key: str
    write_numbers: Callable[[NDArray[np.uint8], Tensor], None] | None = None

    def __call__(self, image: RawImage) -> Tensor:
        """Both stages, of one image (3, H, W); of any number of them where ``pixels`` takes batches."""
        return self.numbers(self.pixels(image))


def two_stage(transform: Callable[[Any], Tensor]) -> TwoStage | None:
    """``transform`` in two stages; None if it draws random numbers or holds a step that is not known to be fixed.

    Known are :class:`TwoStage` itself and a ``Compose`` of torchvision, old or new, whose steps resize, crop the centre, convert
    and normalise: all that open_clip evaluates with.

    Args:
        transform: PIL image or uint8 (3, H, W) -> floating point (3, R, R).
    """
    if isinstance(transform, TwoStage):
        return transform
    steps = getattr(transform, "transforms", None)
    if not isinstance(steps, (list, tuple)) or not type(transform).__module__.startswith(_TORCHVISION):
        return None
    cut = next((place for place, step in enumerate(steps) if not _is_geometry(step)), len(steps))
    geometry, rest = list(steps[:cut]), list(steps[cut:])
    if rest and type(rest[0]).__name__ in ("ToTensor", "MaybeToTensor") and _is_from(rest[0], "ToTensor"):
        rest[0] = _ToTensor()
    if not geometry or not rest or not all(_is_numbers(step) for step in rest):
        return None
    return TwoStage(_Geometry(geometry), _Chain(rest), _told(geometry), _told(rest), _in_place(rest))


def _is_from(step: Any, name: str) -> bool:
    """Whether a step is torchvision's ``name`` or open_clip's variant of it."""
    return any(kind.__name__ == name and kind.__module__.startswith(_TORCHVISION) for kind in type(step).__mro__)


def _is_geometry(step: Any) -> bool:
    kind = type(step)
    if kind.__module__ == "open_clip.transform":
        return kind.__name__ == "MaybeConvertMode" and getattr(step, "mode", None) == "RGB"
    return kind.__module__.startswith(_TORCHVISION) and kind.__name__ in _GEOMETRY


def _is_numbers(step: Any) -> bool:
    kind = type(step)
    return isinstance(step, _ToTensor) or (kind.__module__.startswith(_TORCHVISION) and kind.__name__ in _NUMBERS)


def _told(steps: Sequence[Any]) -> str:
    """What steps do; the data type is named because the ``repr`` of ``ToDtype`` leaves it out."""
    return "; ".join(f"{step!r} {getattr(step, 'dtype', '')}".strip() for step in steps)


class _ToTensor:
    """What torchvision's ``ToTensor`` makes of an RGB image, from its pixels (…, 3, R, R)."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.get_default_dtype()).div(255)

    def __repr__(self) -> str:
        return f"ToTensor() {torch.get_default_dtype()}"


def _in_place(steps: Sequence[Any]) -> Callable[[NDArray[np.uint8], Tensor], None] | None:
    """``ToTensor`` and ``Normalize``, all that open_clip has after the geometry, one pass after the other over ``out``."""
    first, *rest = steps
    if not isinstance(first, _ToTensor) or any(type(step).__name__ != "Normalize" for step in rest):
        return None
    shifts = [
        (torch.as_tensor(step.mean)[..., None, None], torch.as_tensor(step.std)[..., None, None]) for step in rest
    ]
    dtype = torch.get_default_dtype()
    if any(mean.dtype != dtype or value.dtype != dtype or not value.all() for mean, value in shifts):  # zero is refused
        return None

    def write(pixels: NDArray[np.uint8], out: Tensor) -> None:
        np.copyto(out.numpy(), pixels)
        out.div_(255)
        for mean, deviation in shifts:
            out.sub_(mean).div_(deviation)

    return write


class _Chain:
    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = tuple(steps)

    def __call__(self, value: Any) -> Tensor:
        for step in self.steps:
            value = step(value)
        return value


class _Geometry(_Chain):
    def __call__(self, value: RawImage) -> Tensor:
        return as_pixels(super().__call__(value))


def as_pixels(image: RawImage) -> Tensor:
    """An RGB image as a contiguous uint8 tensor (3, H, W).

    Args:
        image: a PIL image, converted to RGB, or uint8 (3, H, W).

    Raises:
        ValueError: a tensor of another dtype or shape.
    """
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1)))
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected a PIL image or uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    return image.as_subclass(Tensor).contiguous()

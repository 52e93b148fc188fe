"""Batches on their way to the device: where it is a GPU, the next one is copied while the present one is computed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")
_END = object()

TO_DEVICE = ("images", "labels", "reference_images")
"""Parts of a batch that are computed with; its indices stay on the host, where caches look them up without waiting."""


def on_device(items: Iterable[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Items with their :data:`TO_DEVICE` on ``device``, in their order.

    For a GPU, the copies of an item are issued one item ahead, from pinned memory, on a stream of their own, so that they pass
    while the GPU computes; images arrive with channels last, in which order it convolves. An error among the items is raised when
    its turn comes.

    Args:
        items: dictionaries of tensors (B, …) on the host.
        device: where they go.
    """
    if device.type != "cuda":
        for item in items:
            yield {name: value.to(device) if name in TO_DEVICE else value for name, value in item.items()}
        return
    copies = _Copies(device)
    for item, copied in one_ahead(items, copies.start):
        yield copies.wait(item, copied)


class _Copies:
    """Copies to a GPU on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, item: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """``item`` as it will be when the event has happened."""
        with torch.cuda.stream(self.stream):
            moved = {name: self._move(value) if name in TO_DEVICE else value for name, value in item.items()}
            return moved, self.stream.record_event()

    def _move(self, value: Tensor) -> Tensor:
        pinned = value if value.is_pinned() else value.pin_memory()
        moved = pinned.to(self.device, non_blocking=True)
        return moved.contiguous(memory_format=torch.channels_last) if moved.ndim == 4 else moved

    def wait(self, item: dict[str, Tensor], copied: torch.cuda.Event) -> dict[str, Tensor]:
        """``item``, whose tensors the present stream may use from here on; the host does not wait."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for name in item.keys() & set(TO_DEVICE):
            item[name].record_stream(stream)  # its memory was given out on the other stream
        return item


def one_ahead(items: Iterable[T], start: Callable[[T], S]) -> Iterator[S]:
    """``start(item)`` of every item; that of the next one is called before the present one is handed out.

    An exception that ``items`` or ``start`` raises comes when everything before it has been used.
    """
    iterator = iter(items)
    failure: Exception | None = None

    def begin() -> S | object:
        nonlocal failure
        try:
            item = next(iterator, _END)
            return _END if item is _END else start(cast(T, item))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is raised below
            failure = error
            return _END

    present = begin()
    while present is not _END:
        following = begin()
        yield cast(S, present)
        present = following
    if failure is not None:
        raise failure

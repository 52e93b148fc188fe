"""Tensors of the host that a device reads a few at a time, while the next ones are on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cl_kernels.host_copy import HostCopy

SLOTS = 2
"""Parts that are on the device together: one that is worked on, one that is on its way."""

_ALIGNMENT = 16
"""Bytes to which tensors are placed in a slot: what vectorised kernels ask for."""


def staging_bytes(parts: Sequence[Sequence[Tensor]]) -> int:
    """What :class:`HostStream` takes of the device to bring it ``parts`` like these, tensors of any shapes on any device."""
    return SLOTS * max((_places_bytes(part, _fits) for part in parts), default=0)


class HostStream:
    """Brings tensors from the host to a device, part by part, through two slots of device memory that are as large as the largest.

    On a CUDA device the copies run on a stream of their own, from pinned memory while that which computes is at work on the part
    before. The two wait for each other on the device alone; the host never does. A CPU may stand for the device.

    Attributes:
        device: where the tensors are read.

    Args:
        device: where the tensors are read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = _side_stream(device)
        self._slots: list[_Slot] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, which stay from the first part on."""
        return sum(slot.room.nbytes for slot in self._slots)

    def stream(self, parts: Sequence[Sequence[Tensor]], after: HostCopy | None = None) -> Iterator[list[Tensor]]:
        """The tensors of every part on the device, in order, until the next part is asked for: nobody may keep them.

        Tensors that lie elsewhere than on the host are handed on as they are. Those that are not contiguous go without a slot, as
        a whole.

        Args:
            parts: lists of tensors, of any shapes and dtypes.
            after: whose tensors they are, where these may still be on their way to the host.
        """
        self._make_room(max((_places_bytes(part, _takes_place) for part in parts), default=0))
        if after is not None and self._side is not None:
            after.precede(self._side)
        under_way: deque[tuple[_Slot, list[Tensor]]] = deque()
        try:
            for number, part in enumerate(parts):
                slot = self._slots[number % SLOTS]
                under_way.append((slot, slot.fetch(part)))
                if len(under_way) == SLOTS:
                    yield from self._next(under_way)
            while under_way:
                yield from self._next(under_way)
        finally:  # also where nobody asks for the rest: a slot is not given up while something is copied there
            for slot, _ in under_way:
                slot.arrive()

    def _next(self, under_way: deque[tuple[_Slot, list[Tensor]]]) -> Iterator[list[Tensor]]:
        """The first part, once it has arrived; what the caller enqueues before it goes on may read the slot."""
        slot, tensors = under_way.popleft()
        slot.arrive()
        try:
            yield [value.to(self.device, non_blocking=True) for value in tensors]
        finally:
            slot.release()

    @torch.no_grad()
    def _make_room(self, size: int) -> None:
        if not self._slots or self._slots[0].room.nbytes < size:
            self._slots.clear()  # before the larger ones are made
            for _ in range(SLOTS):
                room = torch.empty(size, dtype=torch.uint8, device=self.device)
                self._slots.append(_Slot(room, self._side))


class _Slot:
    """Device memory for one part.

    Args:
        room: (bytes,) uint8.
        side: copies into it; None: copies are made at once, in the order of the calls.
    """

    def __init__(self, room: Tensor, side: torch.cuda.Stream | None) -> None:
        self.room, self._side = room, side
        if side is not None:
            self._copied, self._free = torch.cuda.Event(), torch.cuda.Event()
            self.release()  # new memory may have been somebody else's, whose kernels are still to come

    @torch.no_grad()
    def fetch(self, part: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy; where the tensors will be. What takes no place here is in its own."""
        chosen = [number for number, value in enumerate(part) if _takes_place(value)]
        sources = [part[number] for number in chosen]
        places = self._places(sources)
        if self._side is None:
            self._copy(places, sources)
        else:
            self._side.wait_event(self._free)
            with torch.cuda.stream(self._side):
                self._copy(places, sources)
                self._copied.record(self._side)
        found = list(part)
        for number, place in zip(chosen, places, strict=True):
            found[number] = place
        return found

    def arrive(self) -> None:
        """Let the present stream wait for what :meth:`fetch` began."""
        if self._side is not None:
            torch.cuda.current_stream(self.room.device).wait_event(self._copied)

    def release(self) -> None:
        """Let the next :meth:`fetch` wait for what the present stream has been given."""
        if self._side is not None:
            self._free.record(torch.cuda.current_stream(self.room.device))

    def _places(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """A place for each, of its dtype and shape."""
        sizes = [_padded(value.nbytes) for value in sources]
        found = self.room[: sum(sizes)].split(sizes) if sizes else ()
        return [
            place[: value.nbytes].view(value.dtype).view(value.shape)
            for place, value in zip(found, sources, strict=True)
        ]

    @staticmethod
    def _copy(places: list[Tensor], sources: list[Tensor]) -> None:
        if places:
            torch._foreach_copy_(places, sources, non_blocking=True)


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _places_bytes(part: Sequence[Tensor], fits: Callable[[Tensor], bool]) -> int:
    return sum(_padded(value.nbytes) for value in part if fits(value))


def _takes_place(value: Tensor) -> bool:
    return value.device.type == "cpu" and _fits(value)


def _fits(value: Tensor) -> bool:
    return value.is_contiguous()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

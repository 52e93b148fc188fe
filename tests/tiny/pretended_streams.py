"""Two streams of a device that is not there, on which order is checked and copies are as late as it allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_kernels import host_stream

VIEWS = {"slice", "split", "split_with_sizes", "view", "detach", "alias"}


class Event:
    """Knows what came before it: how far every stream was, and which copies were to be made."""

    def __init__(self) -> None:
        self.clock: dict[str, int] = {}
        self.copies: list[Any] = []

    def record(self, stream: Stream) -> None:
        self.clock, self.copies = dict(stream.clock), list(stream.waiting)


class Stream:
    """Its copies are made as late as possible: when another stream waits for them."""

    def __init__(self, name: str) -> None:
        self.name, self.clock, self.waiting = name, {name: 0}, []

    def wait_event(self, event: Event) -> None:
        for copy in event.copies:
            copy()
        self.clock.update({name: max(at, self.clock.get(name, 0)) for name, at in event.clock.items()})


class Device(TorchDispatchMode):
    """Two streams of a device that is not there. Who reads or writes a slot must come after those who used it before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main, self.side = Stream("main"), Stream("side")
        self.present, self.used, self.made, self.copying = self.main, [], set(), False
        self.rooms: dict[int, dict[str, list[tuple[str, int]]]] = {}
        monkeypatch.setattr(host_stream, "_side_stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.present)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.present, before = stream, self.present
        yield
        self.present = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if self.copying:
            return func(*args, **kwargs)
        if name == "_foreach_copy_" and self.present is self.side:
            self.access(args[0], "writes")
            self.side.waiting.append(self.once(lambda: func(*args, **kwargs)))
            return None
        if name not in VIEWS:
            self.access(torch.utils._pytree.tree_leaves(args), "reads")
        made = func(*args, **kwargs)
        if name == "empty" and made.dtype == torch.uint8:
            self.rooms[made.untyped_storage().data_ptr()] = {"reads": [], "writes": []}
        return made

    def once(self, copy):
        def make() -> None:
            if make not in self.made:
                self.made.add(make)
                self.copying = True
                copy()
                self.copying = False

        return make

    def access(self, values, how: str) -> None:
        places = {value.untyped_storage().data_ptr() for value in values if isinstance(value, torch.Tensor)}
        for place in places & self.rooms.keys():
            stream, log = self.present, self.rooms[place]
            for earlier, at in log["writes"] + (log["reads"] if how == "writes" else []):
                assert stream.clock.get(earlier, 0) >= at, f"{stream.name} {how} a slot that {earlier} may be using"
            stream.clock[stream.name] += 1
            log[how].append((stream.name, stream.clock[stream.name]))
            self.used.append((stream.name, how))

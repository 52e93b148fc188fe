"""Counts that travel to the host: asked for when the stream that computed them has sent them, on whichever GPU that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_kernels.drop_in import experts


class OnSecondGPU(Tensor):
    """A tensor in host memory that says it were elsewhere."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda:1")  # type: ignore[assignment]


def test_the_event_is_one_of_the_stream_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        def record(self, stream: Any = None) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    empty = torch.empty

    def pageable(*shape: Any, pin_memory: bool, **options: Any) -> Tensor:
        assert pin_memory
        return empty(*shape, **options)

    monkeypatch.setattr(experts.torch, "empty", pageable)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    chosen = experts.Chosen()
    chosen.set(torch.tensor([3, 0, 5]).as_subclass(OnSecondGPU))
    assert calls == ["of cuda:1"]
    assert chosen.read() == [3, 0, 5]
    assert calls == ["of cuda:1", "waited"]

"""Copies of a model's tensors in host memory that are refreshed without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """Tensors on the host, by name, with the dtypes and shapes of a model's; pinned where the model is on a CUDA device.

    :meth:`start` enqueues the copies on a stream of their own and returns. The stream that trains waits, on the device, until the
    weights have been read, so a following step cannot change them; the host waits in :meth:`wait` alone, in any thread, and a
    stream that reads the copies in :meth:`precede`.

    Attributes:
        tensors: the copies.

    Args:
        tensors: what will be copied, by name.
        pinned: whether all copies are pinned, also those of tensors on the host.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool = False) -> None:
        self.tensors = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=pinned or tensor.is_cuda)
            for name, tensor in tensors.items()
        }
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        self._done = {device: torch.cuda.Event() for device in devices}

    @torch.no_grad()
    def start(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy tensors of the same names, shapes and devices; on the CPU, copy them now."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._copy(tensors, device)
                self._done[device].record(stream)
            torch.cuda.current_stream(device).wait_event(self._done[device])
        self._copy(tensors, torch.device("cpu"))

    def wait(self) -> None:
        """Return when :attr:`tensors` hold what :meth:`start` was given."""
        for event in self._done.values():
            event.synchronize()

    def precede(self, stream: torch.cuda.Stream) -> None:
        """Let what ``stream`` is given from now on come after the copies, without waiting on the host."""
        for event in self._done.values():
            stream.wait_event(event)

    def _copy(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        for name, copy in self.tensors.items():
            if tensors[name].device == device:
                copy.copy_(tensors[name], non_blocking=True)

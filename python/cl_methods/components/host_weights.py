"""Weights in host memory that a device reads element by element: anchors, importances, the model before the task."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_kernels.host_copy import HostCopy
from cl_kernels.host_stream import HostStream


class HostWeights(Mapping[str, Tensor]):
    """Copies of weights on the host, pinned where the device that reads them is a CUDA device. Equal copies of others need none.

    The functions of :mod:`cl_methods.components.weights` read them piece by piece on the device (:meth:`stream`); to everybody
    else they are a mapping of tensors, whoever asks it for one waits until all have been copied.

    Args:
        weights: tensors of any shapes, by name, on any device.
        device: where they will be read.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._copy = HostCopy(weights, pinned=device.type == "cuda")
        self._copy.start(weights)
        self._tensors = dict(self._copy.tensors)
        self._stream = HostStream(device)

    def __getitem__(self, name: str) -> Tensor:
        self._copy.wait()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def device(self) -> torch.device:
        """Where they are read."""
        return self._stream.device

    @property
    def staging(self) -> int:
        """Bytes of the device that reading them has taken."""
        return self._stream.nbytes

    def arriving(self, name: str) -> Tensor:
        """The tensor, which may still be on its way to the host: for :meth:`stream`, not for reading."""
        return self._tensors[name]

    def stream(self, parts: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Views of :meth:`arriving` tensors on the device, part by part, each until the next is asked for.

        Args:
            parts: the views, of any shapes.
        """
        return self._stream.stream(parts, self._copy)

    def share(self, equal: Mapping[str, Tensor]) -> None:
        """Hold the tensors of ``equal``, which nobody writes to, in place of the copies of the same names."""
        self._copy.wait()
        for name, value in equal.items():
            self._tensors[name] = value.detach()
            self._copy.tensors.pop(name, None)


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def give_up_module() -> None:
    """Free a module that nobody refers to any more: blocks refer to themselves, and would stay until somebody notices."""
    gc.collect()

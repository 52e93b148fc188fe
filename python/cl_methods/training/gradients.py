"""The gradient of a step from what each of several processes found: the mean, exchanged in buckets after the backward pass.

No ``DistributedDataParallel``: its wrapper counts on one ``forward`` per step through one module. A step here calls several
encoders, some twice, over parameters of which a method trains a few and a step uses some; and what goes on after the backward pass
(consolidation in closed form, experts without samples) needs the whole gradient anyway.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_methods import ranks

BUCKET_BYTES = 32 << 20


@torch.no_grad()
def average_gradients(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Replace every gradient by its mean over the processes, in place; a parameter without one stays without.

    Parameters that are sharded (FSDP2) have had theirs averaged in the backward pass.

    Args:
        parameters: named; every process has gradients for the same ones (:func:`check_same_graph`).

    Raises:
        OtherRankError: a process is gone.
    """
    gradients = [value.grad for _, value in parameters if value.grad is not None and not hasattr(value, "device_mesh")]
    flying: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for bucket in _buckets(gradients):
        flat = torch.cat([one.reshape(-1) for one in bucket])
        flying.append((bucket, flat, ranks.start_sum(flat)))
        if len(flying) == 2:
            _land(*flying.popleft())
    while flying:
        _land(*flying.popleft())


def _land(bucket: list[Tensor], flat: Tensor, flight: Any) -> None:
    with ranks.exchange():
        flight.wait()
    flat.div_(ranks.count())
    parts = flat.split([one.numel() for one in bucket])
    torch._foreach_copy_(bucket, [part.view(one.shape) for part, one in zip(parts, bucket, strict=True)])


def check_same_graph(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Make sure, in the first step of a stage, that all processes are about to exchange the same gradients.

    Raises:
        RuntimeError: they are not: a method does not compute the same thing everywhere.
    """
    found = [f"{name} {tuple(value.shape)}" for name, value in parameters if value.grad is not None]
    digests = ranks.gather_values((len(found), hashlib.sha256("\n".join(found).encode()).hexdigest()))
    if len(set(digests)) > 1:
        counts = ", ".join(f"rank {rank}: {count}" for rank, (count, _) in enumerate(digests))
        raise RuntimeError(
            f"gradients: expected the same parameters to have one in every process, got different ones ({counts}); "
            "a method must draw random numbers from the seeded generators only, and decide nothing by rank"
        )


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype and device, some 32 MiB together."""
    for kind in dict.fromkeys((one.dtype, one.device) for one in gradients):
        bucket: list[Tensor] = []
        size = 0
        for one in gradients:
            if (one.dtype, one.device) != kind:
                continue
            bucket.append(one)
            size += one.numel() * one.element_size()
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

"""A batch that goes through an encoder part by part: features, gradients and random numbers of the whole, activations of one part.

Losses couple the samples of a batch (column-wise distillation, relations), so gradients cannot be accumulated over its parts. The
cut is at the encoder instead: the loss sees the features of all samples at once, and the activations of a part are computed again
when its gradient is due (Chen et al., "Training deep nets with sublinear memory cost", 2016).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatches:
    """How many samples go through a tower together; None: all that there are.

    Attributes:
        images, texts: where a gradient is needed. Activations of a part are computed twice, or thrice with ``blocks``.
        frozen_images, frozen_texts: where none is needed.
        blocks: within a part, keep the inputs of the residual blocks alone, and compute the rest again block by block.
        keep_last: the last part keeps its activations; they are used first, so this saves computing them again.
    """

    images: int | None = None
    texts: int | None = None
    frozen_images: int | None = None
    frozen_texts: int | None = None
    blocks: bool = False
    keep_last: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "texts", "frozen_images", "frozen_texts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number of samples >= 1 or None, got {value}")


@dataclass(frozen=True)
class Part:
    """Samples ``first … first + count - 1`` of a batch of ``total``, on their way through an encoder.

    Attributes:
        first, count, total: which samples.
        repeated: whether this pass computes activations again; what it counts was counted before.
    """

    first: int
    count: int
    total: int
    repeated: bool = False
    _drawn: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)

    def of(self, whole: Tensor) -> Tensor:
        """The rows of this part in a tensor.

        Args:
            whole: (N, d) or (N,) of the whole batch.

        Returns:
            The rows of this part, a view.
        """
        return whole[self.first : self.first + self.count]

    def draw(self, owner: object, what: str, draw: Callable[[], Tensor]) -> Tensor:
        """Random numbers for the whole batch, drawn when the first part asks; later parts and repetitions get the same.

        So the generators give each batch the numbers, in the order, that they would give to it undivided.

        Args:
            owner: the module that asks; it has to live as long as the pass.
            what: which of its numbers.
            draw: draws them for the whole batch.

        Returns:
            What ``draw`` gave: the numbers of the whole batch.
        """
        key = id(owner), what
        if key not in self._drawn:
            self._drawn[key] = draw()
        return self._drawn[key]


_part: contextvars.ContextVar[Part | None] = contextvars.ContextVar("part", default=None)
_middle_left_out: contextvars.ContextVar[bool] = contextvars.ContextVar("middle_left_out", default=False)


def current_part() -> Part | None:
    """The part that is being encoded; None where a batch goes through undivided."""
    return _part.get()


@contextmanager
def as_part(part: Part) -> Iterator[None]:
    """Inside, modules see ``part``."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def leaving_out_middle_parts() -> Iterator[None]:
    """Inside, only the first part of a batch and the last are encoded; the features of the others are whatever is in memory.

    For rehearsals on tensors without data: parts of one size need the same memory.
    """
    token = _middle_left_out.set(True)
    try:
        yield
    finally:
        _middle_left_out.reset(token)


def encode_in_parts(
    encode: Encoder,
    batch: Tensor,
    size: int | Sequence[int] | None,
    *,
    blocks: Iterable[nn.Module] = (),
    keep_last: bool = False,
    again: bool = True,
    place: Part | None = None,
) -> Tensor:
    """``encode(batch)``, at most ``size`` samples at a time.

    Where gradients are recorded, only the parts' inputs are kept, and ``encode`` runs again in the backward pass; without ``again``
    the inputs of ``blocks`` are kept too, and nothing but these runs again. What encoders look up there must be in a
    ``ContextVar``: it is restored to what it was in the forward pass. Random numbers that do not come from :meth:`Part.draw` are
    those of the parts, not of the whole batch.

    Args:
        encode: (n, …) -> (n, d), row by row: no row may depend on another.
        batch: (N, …).
        size: samples per part, or the samples of every part; a batch that is one part is not computed again. None: all.
        blocks: modules inside ``encode`` whose activations are computed again one after the other.
        keep_last: do not compute the last part's activations again.
        again: whether a part may run again as a whole.
        place: where ``batch`` lies in a larger one, of which other processes encode the rest; None: it is the whole.

    Returns:
        (N, d).
    """
    total = len(batch)
    place = Part(0, total, total) if place is None else place
    size = max(1, total) if size is None else size
    blocks, recorded = list(blocks), torch.is_grad_enabled()
    drawn: dict[tuple[int, str], Tensor] = {}
    outputs: list[Tensor] = []
    first, parts = 0, batch.split(size) if total else (batch,)
    for number, rows in enumerate(parts):
        part = Part(place.first + first, len(rows), place.total, repeated=place.repeated, _drawn=drawn)
        first, last = first + len(rows), number == len(parts) - 1
        if _middle_left_out.get() and number and not last and (again or not recorded):
            outputs.append(outputs[0].new_empty(len(rows), *outputs[0].shape[1:]))
            continue
        keep = not (recorded and again) or len(parts) == 1 or (keep_last and last)
        run = partial(_with_blocks, encode, blocks if recorded else [])
        if keep:
            with as_part(part):
                outputs.append(run(rows))
        else:
            outputs.append(checkpoint(_Repeatable(run, part), rows, use_reentrant=False))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Repeatable:
    """A function that finds the same context variables in every call, and from the second call on a repeated part."""

    def __init__(self, function: Callable[..., Tensor], part: Part) -> None:
        self._function, self._part = function, part
        self._context = contextvars.copy_context()
        self._called = False

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        part = replace(self._part, repeated=self._part.repeated or self._called)
        self._called = True
        return self._context.copy().run(self._run, part, arguments, options)

    def _run(self, part: Part, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        with as_part(part):
            return self._function(*arguments, **options)


def _with_blocks(encode: Encoder, blocks: list[nn.Module], rows: Tensor) -> Tensor:
    """``encode(rows)`` with the activations of every block of ``blocks`` computed again when they are needed."""
    with _recomputed(blocks):
        return encode(rows)


@contextmanager
def _recomputed(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, the forward of each block is checkpointed; instances that have a forward of their own get it back."""
    before = [(block, vars(block).get("forward")) for block in blocks]
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, own in before:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    part = current_part()
    assert part is not None
    return checkpoint(_Repeatable(forward, part), *arguments, use_reentrant=False, **options)

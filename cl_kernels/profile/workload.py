"""A training step that can be recorded and timed: what it computes, and whose modules it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels import dispatch
from cl_kernels.moe_adapter import dropout
from cl_kernels.profile.recorder import Recorder, StepRecord


@dataclass(frozen=True)
class Workload:
    """One step of training, or one forward pass.

    Attributes:
        modules: the parts to report on, by name.
        inputs: tensors of any shape that the step reads and that are there before it.
        forward: returns the loss to differentiate; None, or a tensor without gradient, where there is nothing to learn.
        update: the optimiser's part after the backward pass.
        context: entered around every step.
        true_share: see :class:`~cl_kernels.profile.Recorder`.
        samples: of the batch, for figures per sample.
    """

    modules: Mapping[str, nn.Module]
    inputs: Sequence[Tensor]
    forward: Callable[[], Tensor | None]
    update: Callable[[], None] | None = None
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    true_share: float | None = None
    samples: int = 1

    @property
    def device(self) -> torch.device:
        """Where the step runs: where its inputs are."""
        return self.inputs[0].device if self.inputs else torch.device("cpu")

    def parameters(self) -> list[nn.Parameter]:
        """Of all modules, each once."""
        return list({id(p): p for module in self.modules.values() for p in module.parameters()}.values())

    def run(self, phase: Callable[[str], None] = lambda name: None) -> None:
        """One step. Gradients start empty.

        Args:
            phase: told ``"forward"``, ``"backward"`` and ``"optimizer"`` as they begin.
        """
        for parameter in self.parameters():
            parameter.grad = None
        with self.context():
            phase("forward")
            loss = self.forward()
            if loss is not None and loss.requires_grad:
                phase("backward")
                loss.backward()
                if self.update is not None:
                    phase("optimizer")
                    self.update()


def record_step(work: Workload) -> StepRecord:
    """Run one step of ``work`` and record every operation."""
    given = [*work.parameters(), *(b for m in work.modules.values() for b in m.buffers(recurse=False)), *work.inputs]
    recorder = Recorder(work.modules, given, true_share=work.true_share)

    def enter(name: Any) -> None:
        recorder.phase = name

    with recorder:
        work.run(enter)
    return recorder.record


@contextmanager
def frozen_parameters(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, none of ``parameters``, of any shape, requires a gradient."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Inside, our operations run on their references, and dropout draws its mask as ``torch.nn.functional.dropout`` does.

    The references draw the bits of the kernels, a hundred integer operations that nobody's own code would contain. Holds for the
    whole process.
    """
    counter_based = dropout.keep

    def keep(seed: Tensor, row: Tensor, rank: int, p: float) -> Tensor:
        return torch.rand(*row.shape, rank, device=row.device) >= p

    dropout.keep = keep
    try:
        with dispatch.use_backend("reference"):
            yield
    finally:
        dropout.keep = counter_based

"""What a training step may not do, whatever the method: make the host wait for the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from shortened import TRAINED, shortened
from tiny_clip import build_backbone

from cl_kernels.profile import HostWaits
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch, Method
from cl_methods.training.task import TaskTraining


class Watched:
    """The hooks of a step of ``method``, each under :class:`HostWaits`; the optimiser is torch's or tested by itself."""

    def __init__(self, method: Method) -> None:
        self.method, self.steps = method, 0
        self.waits: dict[str, int] = {}
        self._loss, self._before, self._after = method.loss, method.before_step, method.after_step
        method.loss, method.before_step, method.after_step = self.loss, self.before_step, self.after_step

    def _watch(self, batch: Batch | None) -> HostWaits:
        model = self.method.backbone.model
        shown = () if batch is None else (batch.images, batch.labels, batch.reference_images)
        tensors = itertools.chain(
            model.parameters(), model.buffers(), (value for _, value in self.method.trainable()), shown
        )
        return HostWaits([tensor for tensor in tensors if tensor is not None])

    def _note(self, waits: HostWaits, hook: str) -> None:
        for name, count in waits.by_name.items():
            self.waits[f"{hook}: {name}"] = self.waits.get(f"{hook}: {name}", 0) + count

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.steps += 1
        with self._watch(batch) as waits:
            terms = self._loss(batch)
            terms["loss"].backward(retain_graph=True)  # the loop's own backward repeats it
        for _, value in self.method.trainable():
            value.grad = None
        self._note(waits, "loss and backward")
        return terms

    def before_step(self, batch: Batch) -> None:
        gradients = [value.grad for _, value in self.method.trainable() if value.grad is not None]
        with self._watch(batch) as waits:
            for gradient in gradients:
                waits.mark(gradient)
            self._before(batch)
        self._note(waits, "before_step")

    def after_step(self, step: int) -> None:
        with self._watch(None) as waits:
            self._after(step)
        self._note(waits, "after_step")


@pytest.mark.parametrize("name", TRAINED)
def test_no_step_waits_for_the_device(name: str, tasks: list[Task], reference: Reference) -> None:
    torch.manual_seed(0)
    method = METHODS[name](build_backbone(), shortened(METHODS[name].default_config("mini")), reference)
    watched = Watched(method)
    for index in [0] if method.joint else range(len(tasks)):
        TaskTraining(method, index, tasks).execute()
    assert watched.steps >= 2
    assert watched.waits == {}

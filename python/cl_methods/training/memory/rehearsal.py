"""Bytes that a method needs, counted by rehearsing its hooks and a training step on tensors that have shapes and no data."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cl_methods import ranks
from cl_methods.backbone import Backbone, Precision
from cl_methods.backbone.micro_batches import MicroBatches, leaving_out_middle_parts
from cl_methods.components.weights import staging_bytes
from cl_methods.datasets.copying import TO_DEVICE
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Method
from cl_methods.ranks.pretended import PretendedGroup
from cl_methods.ranks.simulated import simulated
from cl_methods.sharding import gathered, local, shard
from cl_methods.training.gradients import BUCKET_BYTES
from cl_methods.training.memory.blank_weights import BlankWeights
from cl_methods.training.memory.live import LiveMemory, TooLongError
from cl_methods.training.memory.stand_ins import IMAGES, blank_transform, stand_ins_for
from cl_methods.training.planning.counting import short_fits
from cl_methods.training.planning.without_data import BlankImages
from cl_methods.training.task import use_micro_batches

_CAPTIONS = 2048
"""Reference texts that are rehearsed."""

_OPERATIONS = 20_000
"""Operations of a hook at the end of a task that are rehearsed."""


class Rehearsal:
    """A method on a model without data, ready for the training steps of its last task.

    The earlier tasks stand together as one, with the classes of all of them, so that what grows with the classes has its final
    size. Images are blank, and few.

    Attributes:
        memory: counts.
        model, carried, optimiser: bytes of the model's weights and buffers; of what else the method holds between steps
            (teachers, anchors, averages, adapters, cached features); of the optimiser's state.
        averages, anchors: of these, averages of weights; weights that others are compared or mixed with, and nobody computes with.
        staging: bytes of a GPU that reading the anchors from the host takes.
        gradients: bytes of the gradients.
        copied_ahead: bytes of a batch, of which a GPU holds the next one while it computes on the present one.
        optimizer: fresh in every respect but the first step.
        left_out: what could not be rehearsed, as a phrase; None if nothing.
        processes, sharded: as given.
        exchanged: by the last step, of sharded weights and their gradients: bytes of a tensor that is gathered from the shares of
            all processes, or reduced to them -> how often.

    Args:
        method: its class.
        settings: its configuration.
        backbone: gives the shapes; its weights may be anywhere, also on the meta device. Not changed.
        tasks: the sequence.
        reference: reference data, or None.
        parts: micro-batches of the preparation and the first step.
        processes: how many share the encoding of a batch; the one with most rows is rehearsed.
        sharded: whether each of them holds some rows of the weights alone (:mod:`cl_methods.sharding`).
        gloo: whether they exchange with gloo, which copies what it sends.
        evaluated: images of an evaluation that go through the image tower together.
    """

    def __init__(
        self,
        method: type[Method],
        settings: Any,
        backbone: Backbone,
        tasks: Sequence[Task],
        reference: Reference | None,
        parts: MicroBatches | None,
        processes: int = 1,
        *,
        sharded: bool = False,
        gloo: bool = True,
        evaluated: int = 64,
    ) -> None:
        # One iteration of a fit takes the memory of them all.
        self.settings, self.left_out, self.processes = short_fits(settings, own_features=False), None, processes
        self.sharded, self._group = sharded, PretendedGroup(processes) if sharded else None
        self._gloo, self._evaluated = gloo, evaluated
        self.exchanged: Counter[int] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = LiveMemory(self._fake, all_empty=sharded)
        self._weights = BlankWeights(self._fake, self.memory)
        stand_ins = stand_ins_for(tasks, joint=method.joint)
        blank = (
            None
            if reference is None
            else Reference(BlankImages(min(IMAGES, len(reference.images)), 1), reference.captions[:_CAPTIONS])
        )
        build: Callable[[], Method] = lambda: self._cut(method(self._shapes(backbone, parts), self.settings, blank))  # noqa: E731
        # Of so few images another process may hold all; in whole batches each needs what it needs with many.
        with self._rehearsing(), ranks.alone():
            self.method = build()
            if len(stand_ins) > 1:
                try:
                    self.method.before_task(0, stand_ins[0])
                    self.memory.operations_left = _OPERATIONS
                    self.method.after_task(0, stand_ins[0])
                except (DataDependentOutputException, NotImplementedError, TooLongError) as error:
                    self.left_out = f"what {method.name} keeps of earlier tasks ({type(error).__name__})"
                self.memory.operations_left = None
                if self.left_out is not None:
                    del self.method
                    gc.collect()
                    self.memory.peak = self.memory.bytes
                    self.method, stand_ins = build(), stand_ins[1:]
            self.task = stand_ins[-1]
            self.method.before_task(len(stand_ins) - 1, self.task)
            stage = self.method.stages(self.task)[0]
            self.method.stage = stage
            self.method.before_stage(stage)
            self._prepared = self.memory.peak
            self.optimizer = self.method.optimizer()
            self.batch_size, self._stage_steps, self._steps = stage.batch_size, stage.steps, 0
        self.gradients = 0
        self._update: int | None = None
        self.step(None)  # which has the fewest operations
        self.gradients = _bytes(value.grad for value in self._trainable)
        self.optimiser = _bytes(value for state in self.optimizer.state.values() for value in state.values())
        self.averages = _bytes(self.method.averaged_weights().values())
        held = self.method.anchors()
        self.anchors = sum(_bytes(weights.values()) for weights in held)
        self.staging = sum(map(staging_bytes, held))
        self.carried = self.memory.bytes - self.model - self.optimiser - self.gradients

    def step(self, parts: MicroBatches | None, precision: Precision = "fp32") -> int:
        """The most bytes that are alive in one training step with these micro-batches, in this precision."""
        with self._rehearsing():
            method, memory = self.method, self.memory
            use_micro_batches(method, parts)
            method.backbone.precision = precision
            batch = self._batch()
            self.copied_ahead = _bytes(getattr(batch, name) for name in TO_DEVICE)
            memory.peak = memory.bytes
            self.exchanged.clear()
            self.optimizer.zero_grad(set_to_none=True)
            terms = method.loss(batch)
            terms["loss"].backward()
            if self.processes > 1 and self._group is None:  # two buckets of gradients are under way at a time
                memory.peak = max(memory.peak, memory.bytes + min(2 * BUCKET_BYTES, self.gradients))
            method.before_step(batch)
            self._update_weights()
            if self._steps < self._stage_steps:  # averages may know how many steps to expect
                method.after_step(0)
                self._steps += 1
            return memory.peak

    def _update_weights(self) -> None:
        """The optimiser's step; from the third one on only the memory that the second took, which is that of every later one."""
        memory = self.memory
        held, peak = memory.bytes, memory.peak
        if self._update is None:
            memory.peak = held
            self.optimizer.step()
            if self.gradients:
                self._update = memory.peak - held
            memory.peak = max(peak, memory.peak)
        else:
            memory.peak = max(peak, held + self._update)

    def outside(self, parts: MicroBatches | None) -> int:
        """The most bytes outside of the steps, where sharded weights are whole: loaded, copied for a teacher, evaluated.

        0 where weights are not sharded: there the steps need more.
        """
        if not self.sharded:
            return 0
        backbone, memory = self.method.backbone, self.memory
        with self._rehearsing(), torch.no_grad(), ranks.alone():
            use_micro_batches(self.method, parts)
            memory.peak = memory.bytes
            with gathered(backbone):
                size = backbone.train_transform(None).shape
                backbone.encode_images(self._images(self._evaluated, size, backbone.device))
            return max(self._prepared, memory.peak - self.optimiser)

    @property
    def largest_batch(self) -> int:
        """Images that a step sends through the image tower together."""
        batch = self._batch()
        return len(batch.images) + (0 if batch.reference_images is None else len(batch.reference_images))

    @property
    def _trainable(self) -> list[nn.Parameter]:
        return [value for _, value in self.method.trainable()]

    def _shapes(self, backbone: Backbone, parts: MicroBatches | None) -> Backbone:
        """A copy whose weights have no data, but for single numbers."""
        memo: dict[int, Any] = {}
        for value in (*backbone.model.parameters(), *backbone.model.buffers()):
            memo[id(value)] = self._weights.shape_of(value, backbone.device)
        network = copy.deepcopy(backbone.model, memo)
        blank: Callable[[Any], Tensor] = blank_transform(backbone)
        shapes = Backbone(network, backbone.tokenize, blank, blank, name=backbone.name, device=backbone.device)
        shapes.micro_batches = parts
        for value in (*network.parameters(), *network.buffers()):
            self.memory.count(value)
        self.model = self.memory.bytes
        return shapes

    def _cut(self, method: Method) -> Method:
        """``method``, with the weights of its backbone sharded if they are to be."""
        if self._group is None:
            return method
        from cl_methods.training.memory.sharded_steps import pretend_exchanges

        model = method.backbone.model
        shard(method.backbone)
        self.exchanged = pretend_exchanges(model, self.memory, self._fake, copies=self._gloo)
        self.model = _bytes((*model.parameters(), *model.buffers()))
        return method

    def _batch(self) -> Batch:
        backbone, count = self.method.backbone, self.batch_size
        source = self.method.training_images(self.task)
        others = self.method.reference_source(self.task) if self.method.uses_reference else None
        size = backbone.train_transform(None).shape
        rows = torch.arange(count) % max(1, len(source))
        shown, places = None, None
        if others is not None:
            places = torch.arange(getattr(self.settings, "reference_batch_size", count)) % max(1, len(others))
            shown = self._images(len(places), size, backbone.device)
        task = self.task if self.method.joint else None
        images = self._images(count, size, backbone.device)
        return Batch(images, source.labels[rows].to(backbone.device), 0, shown, places, task, rows)

    def _images(self, count: int, size: torch.Size, device: torch.device) -> Tensor:
        with self._fake:
            images = torch.empty(count, *size, device=device)
        self.memory.count(images)
        return images

    @contextlib.contextmanager
    def _rehearsing(self) -> Iterator[None]:
        with (
            warnings.catch_warnings(),
            self._weights.everywhere(),
            torch.random.fork_rng(),
            simulated(self.processes),
            contextlib.nullcontext() if self._group is None else self._group.as_default(),
            leaving_out_middle_parts(),
            self.memory,
        ):
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copy.deepcopy
            yield


def _bytes(values: Iterable[Any]) -> int:
    """Of the tensors among ``values``, which share no memory; of sharded ones this process's rows."""
    return sum(local(value).nbytes for value in values if isinstance(value, Tensor))

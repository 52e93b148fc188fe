"""Batches are a pure function of (seed, task, step)."""

from __future__ import annotations

import gc
import multiprocessing
import os

import pytest
import torch
from fakes import tiny_scenario, to_float, to_noisy_float

from cl_methods.datasets.images import DataError, ImageSource
from cl_methods.datasets.loading import ImageReader, evaluation_batches
from cl_methods.training.data import TrainingSteps, one_pass, stream_indices, training_batches

CPU = torch.device("cpu")


def make_steps(**options) -> TrainingSteps:
    scenario = tiny_scenario()
    settings = {
        "task_index": 0,
        "seed": 3,
        "batch_size": 8,
        "reference_batch_size": 4,
        "train_transform": to_noisy_float,
        "eval_transform": to_float,
        **options,
    }
    return TrainingSteps(settings.pop("tasks", scenario.tasks[:1]), scenario.reference.images, **settings)


def read(steps: TrainingSteps, start: int = 0, workers: int = 0):
    return list(training_batches(steps, start_step=start, iterations=9, device=CPU, workers=workers))


def same(first, second) -> bool:
    fields = ("images", "labels", "reference_images", "reference_indices")
    return first.step == second.step and all(torch.equal(getattr(first, f), getattr(second, f)) for f in fields)


def test_same_batches_for_any_number_of_workers_and_any_start():
    whole = read(make_steps())
    assert [batch.step for batch in whole] == list(range(10))
    torch.manual_seed(99)
    for workers, start in ((0, 4), (2, 0), (2, 7)):
        others = read(make_steps(), start, workers)
        assert len(others) == 10 - start
        assert all(same(first, second) for first, second in zip(whole[start:], others, strict=True))


def test_seed_task_and_step_change_order_and_augmentation():
    whole, other_seed, other_task = read(make_steps()), read(make_steps(seed=4)), read(make_steps(task_index=1))
    assert not torch.equal(whole[0].images, whole[1].images)
    assert not torch.equal(whole[0].images, other_seed[0].images)
    assert not torch.equal(whole[0].images, other_task[0].images)


def test_every_image_comes_once_per_epoch_also_across_batches():
    stream = torch.cat([stream_indices(20, start, 8, 3, "order", 0) for start in range(0, 80, 8)])
    epochs = stream.view(4, 20)
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(stream_indices(3, 5, 11, "more than three epochs in one batch")) == 11


def test_joint_training_takes_turns_and_names_the_task():
    tasks = tiny_scenario().tasks
    batches = read(make_steps(tasks=tasks))
    assert [batch.task.name for batch in batches] == [f"task{step % 3}" for step in range(10)]
    seen = torch.cat([make_steps(tasks=tasks)._read(step)["labels"] for step in (1, 4)])
    assert len(seen) == 16


class CountingImages(ImageSource):
    def __init__(self, count: int, broken: int = -1) -> None:
        self.labels, self.reads, self.broken = torch.arange(count) % 3, [], broken

    def image(self, index: int) -> torch.Tensor:
        if index == self.broken:
            raise DataError(f"image {index} is broken")
        self.reads.append(index)
        return torch.full((3, 4, 4), index, dtype=torch.uint8)

    def fingerprint(self) -> str:
        return "counting"


def test_every_image_of_a_batch_is_read_once():
    source = CountingImages(20)
    task = tiny_scenario().tasks[0]
    steps = make_steps(tasks=[type(task)(task.name, task.class_names, task.templates, source, source, source)])
    assert steps[0]["images"].shape == (8, 3, 4, 4)
    assert len(source.reads) == 8
    source.reads.clear()
    list(evaluation_batches(source, to_float, batch_size=8, device=CPU))
    assert source.reads == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_reads_every_image_once_in_an_order_of_its_own(workers):
    task = tiny_scenario().tasks[0]

    def read_pass(start=0, **changes):
        settings = {"task_index": 1, "seed": 3, "batch_size": 8, "transform": to_float, "device": CPU, **changes}
        return list(one_pass(task, start_step=start, workers=workers, **settings))

    whole = read_pass()
    assert [(batch.step, len(batch.labels)) for batch in whole] == [(0, 8), (1, 8), (2, 4)]
    images = torch.cat([batch.images for batch in whole]).flatten(1)
    stored = to_float(task.train.images).flatten(1)
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, stored.tolist()))
    assert not torch.equal(images, stored)
    for later, same_step in zip(read_pass(start=1), whole[1:], strict=True):
        assert later.step == same_step.step
        assert torch.equal(later.images, same_step.images)
        assert torch.equal(later.labels, same_step.labels)
    for change in ({"seed": 4}, {"task_index": 2}):
        assert not torch.equal(torch.cat([batch.images for batch in read_pass(**change)]).flatten(1), images)


def test_a_task_without_images_is_named():
    task = tiny_scenario(train=0).tasks[0]
    with pytest.raises(DataError, match="task task0 has no training images"):
        next(one_pass(task, task_index=0, seed=0, batch_size=8, transform=to_float, device=CPU))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_reported_in_one_sentence(workers):
    with pytest.raises(DataError, match=r"^image 9 is broken$"):
        list(evaluation_batches(CountingImages(20, broken=9), to_float, batch_size=8, device=CPU, workers=workers))


def test_evaluation_keeps_the_order_and_the_short_last_batch():
    source = tiny_scenario().tasks[0].test
    for workers in (0, 2):
        batches = list(evaluation_batches(source, to_float, batch_size=4, device=CPU, workers=workers))
        assert [len(labels) for _, labels in batches] == [4, 4, 1]
        assert torch.equal(torch.cat([labels for _, labels in batches]), source.labels)


def with_process(image: torch.Tensor) -> torch.Tensor:
    """The process that read it, as a pixel that numbers of processes fit into."""
    found = to_float(image)
    found[0, 0, 0] = os.getpid()
    return found


def numbered_sources() -> list[ImageSource]:
    return [CountingImages(10), CountingImages(7), CountingImages(9)]


def test_one_set_of_processes_reads_all_sources_until_it_is_closed():
    reader = ImageReader(numbered_sources(), with_process, batch_size=4, device=CPU, workers=2)
    whole = [(source, number) for source, batches in enumerate((3, 2, 3)) for number in range(batches)]
    processes = set()
    before = torch.get_rng_state()
    for wanted in (whole, whole[3:], whole[:5]):
        found = list(reader.read(wanted))
        for (source, number), (images, labels) in zip(wanted, found, strict=True):
            expected = numbered_sources()[source]
            places = range(len(expected))[4 * number : 4 * number + 4]
            assert torch.equal(labels, expected.labels[places.start : places.stop])
            assert torch.equal(images[:, 1:], torch.stack([to_float(expected.image(place)) for place in places])[:, 1:])
            processes |= {int(image[0, 0, 0]) for image in images}
        next(reader.read(whole))  # given up in its middle
    assert torch.equal(torch.get_rng_state(), before)
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert processes <= {child.pid for child in multiprocessing.active_children()}
    reader.close()
    gc.collect()
    assert not processes & {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(ValueError, match="expected a reader that is open"):
        reader.read(whole)


def test_a_broken_image_does_not_end_the_reader():
    sources = [CountingImages(8, broken=5), CountingImages(4)]
    reader = ImageReader(sources, to_float, batch_size=4, device=CPU, workers=1)
    with pytest.raises(DataError, match=r"^image 5 is broken$"):
        list(reader.read([(0, 0), (0, 1)]))
    assert len(list(reader.read([(1, 0), (0, 0)]))) == 2
    reader.close()

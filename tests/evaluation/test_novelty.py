"""Novel images are those of tasks to come, scored among the classes of the tasks that were learnt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Task
from cl_methods.evaluation.novelty import novelty_of_later_tasks
from cl_methods.evaluation.uncertainty import novelty_detection
from cl_methods.methods.base import Method


class Linear(Method):
    """Fixed random scores for each class name."""

    name = "linear"

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(
            eval_transform=lambda image: image.float() / 255, device=torch.device("cpu"), model=torch.nn.Identity()
        )
        self._classifiers = {}
        self.asked: set[str] = set()

    def logits(self, images, task):
        self.asked.add(task.name)
        return images.flatten(1) @ torch.stack([self.direction(name) for name in task.class_names]).T

    def direction(self, name: str):
        return torch.randn(12, generator=torch.Generator().manual_seed(len(name)))

    def trainable(self):
        return []

    def loss(self, batch):
        raise AssertionError("nothing trains")


def make_task(number: int, names: tuple[str, ...], count: int) -> Task:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (count, 3, 2, 2), generator=generator).byte()
    source = TensorImages(images, torch.arange(count) % len(names))
    return Task(f"task{number}", names, ("{}",), source, source, source)


TASKS = [make_task(0, ("a", "bb"), 5), make_task(1, ("ccc",), 4), make_task(2, ("dddd", "eeeee"), 7)]


@pytest.mark.parametrize("learnt", [1, 2])
@pytest.mark.parametrize("kind", ["energy", "entropy"])
def test_images_of_later_tasks_are_novel(kind, learnt):
    method = Linear()
    found = novelty_of_later_tasks(method, TASKS, learnt, kind, batch_size=3)
    assert method.asked == {task.name for task in TASKS[:learnt]}
    scores = [
        torch.cat([method.logits(task.test.images.float() / 255, known) for known in TASKS[:learnt]], dim=1)
        for task in TASKS
    ]
    expected = novelty_detection(torch.cat(scores[:learnt]), torch.cat(scores[learnt:]), kind)
    assert found == pytest.approx(expected)
    assert 0 < found["auroc"] < 1


def test_draws():
    method, noise = Linear(), torch.tensor([0.0, 1.0, 3.0])[:, None, None]
    found = novelty_of_later_tasks(
        method, TASKS, 1, "variance", scores=lambda images, task: noise * method.logits(images, task)
    )
    scores = [noise * method.logits(task.test.images.float() / 255, TASKS[0]) for task in TASKS]
    assert found == pytest.approx(novelty_detection(scores[0], torch.cat(scores[1:], dim=1), "variance"))


@pytest.mark.parametrize("learnt", [0, 3])
def test_something_must_be_learnt_and_something_left(learnt):
    with pytest.raises(ValueError, match=f"learnt: expected 1 to 2 of 3 tasks, got {learnt}"):
        novelty_of_later_tasks(Linear(), TASKS, learnt)

"""Exemplars: herding, budget and balance; what replay and iCaRL make of them; restarting with the images found again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images, transform
from torch import Tensor
from torch.nn import functional as F
from trained import SHORT, state, weights, with_sgd

import cl_kernels as clk
from cl_methods.components.exemplars import ExemplarMemory, Exemplars, encode_source, herding
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.task import Continuation, TaskTraining


def build(name: str, **settings: Any) -> Any:
    few = {"memory": 12, "batch_size": 6, "reference_batch_size": 5}
    return METHODS[name](build_backbone(), METHODS[name].Config(**{**SHORT, **few, **settings}))


def learnt(name: str, tasks: list[Task], **settings: Any) -> Any:
    """A method after the first of the tasks, through the training loop itself."""
    method = build(name, **settings)
    TaskTraining(method, 0, tasks).execute()
    return method


def memory_batch(method: Any, task: Task, rows: list[int]) -> Batch:
    """Six images of the task and the given rows of the memory."""
    source = method.reference_source(task)
    images = torch.stack([transform(task.train.image(index)) for index in range(6)])
    stored = torch.stack([transform(source.image(row)) for row in rows])
    return Batch(images, task.train.labels[:6], 0, stored, torch.tensor(rows), task)


@pytest.mark.parametrize(("rows", "width", "normalised"), [(1, 4, True), (9, 3, True), (17, 8, False), (6, 2, False)])
def test_herding_is_greedy(rows: int, width: int, normalised: bool) -> None:
    """Against the definition, every candidate tried in float64; a prefix is the answer for a smaller number."""
    torch.manual_seed(rows)
    features = torch.randn(rows, width)
    if normalised:
        features = F.normalize(features, dim=1)
    chosen: list[int] = []
    exact = features.double()
    for k in range(1, rows + 1):
        left = [row for row in range(rows) if row not in chosen]
        apart = [float((exact.mean(0) - exact[[*chosen, row]].sum(0) / k).norm()) for row in left]
        chosen.append(left[apart.index(min(apart))])
    assert herding(features, rows).tolist() == chosen
    assert herding(features, rows + 3).tolist() == chosen
    assert herding(features, 2).tolist() == chosen[:2]
    assert herding(features[:0], 2).tolist() == []
    assert herding(features, 0).tolist() == []


def uneven_task(name: str, counts: list[int]) -> Task:
    images = noise_images(sum(counts), 7, 1)
    generator = torch.Generator().manual_seed(1)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images.labels = labels[torch.randperm(len(labels), generator=generator)]
    return Task(name, tuple(f"{name}{label}" for label in range(len(counts))), ("a {}",), images, images, images)


def test_the_memory_is_balanced_and_within_its_budget() -> None:
    tasks = [uneven_task("a", [9, 2, 9]), uneven_task("b", [9, 9]), uneven_task("c", [9, 0, 9, 9])]
    memory, before = ExemplarMemory(14), {}
    expected = [[5, 2, 4], [3, 2, 3, 3, 2], [2, 2, 2, 2, 2, 1, 0, 1, 1]]
    for index, task in enumerate(tasks):
        memory.check(index, task)
        memory.add(task, lambda rows, count: rows.flip(0)[:count])
        counts = []
        for place, known in enumerate(memory.tasks):
            rows = memory.indices[place]
            labels = known.train.labels[rows]
            assert torch.equal(labels, labels.sort(stable=True).values)
            assert len(set(rows.tolist())) == len(rows)
            for label in range(len(known.class_names)):
                kept = rows[labels == label].tolist()
                counts.append(len(kept))
                assert kept == before.get((place, label), kept)[: len(kept)], "cut off from the end"
                before[place, label] = kept
        assert counts == expected[index]
        assert len(memory) == sum(counts) <= 14
    copy = ExemplarMemory(14)
    copy.load_state_dict(memory.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(copy.indices, memory.indices, strict=True))
    with pytest.raises(RuntimeError, match=r"knows 0 tasks and holds images of 3; call load_state_dict and recall"):
        copy.check(3, tasks[0])
    small = ExemplarMemory(4)
    small.add(tasks[0], lambda rows, count: rows[:count])
    with pytest.raises(ValueError, match="memory: expected at least one image for each of the 5 classes up to task b"):
        small.check(1, tasks[1])


def test_exemplars_are_one_source(tasks: list[Task]) -> None:
    rows = [torch.tensor([5, 0, 7]), torch.tensor([2, 1])]
    source = Exemplars(tasks, rows)
    found = [(place, index) for place in range(2) for index in rows[place].tolist()]
    assert len(source) == 5
    for position, (place, index) in enumerate(found):
        assert torch.equal(source.image(position), tasks[place].train.image(index))
        assert (source.positions[position], source.labels[position]) == (place, tasks[place].train.labels[index])
    assert source.fingerprint() != Exemplars(tasks, [rows[0], rows[1].flip(0)]).fingerprint()


@pytest.mark.parametrize("name", ["replay", "icarl"])
def test_the_first_task_is_fine_tuning(name: str, tasks: list[Task]) -> None:
    method, plain = (
        build(name),
        METHODS["finetune"](build_backbone(), METHODS["finetune"].Config(**SHORT, batch_size=6)),
    )
    TaskTraining(method, 0, tasks).execute()
    TaskTraining(plain, 0, tasks).execute()
    for (key, value), (_, other) in zip(method.trainable(), plain.trainable(), strict=True):
        assert torch.equal(value, other), key
    assert len(method.memory) == 12


def separate_terms(
    method: Any, tasks: list[Task], batch: Batch, positions: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Both cross-entropies of one step, image by image and each among the classes of its own task."""
    backbone = method.backbone

    def entropy(images: Tensor, task: Task, targets: Tensor) -> Tensor:
        texts = backbone.encode_texts(backbone.tokenize([f"a photo of {name}" for name in task.class_names]))
        scores = backbone.logit_scale * backbone.encode_images(images) @ texts.T
        return F.cross_entropy(scores, targets, label_smoothing=0.2)

    stored = [
        entropy(image[None], tasks[place], label[None])
        for image, place, label in zip(batch.reference_images, positions.tolist(), labels, strict=True)
    ]
    return {"cross_entropy": entropy(batch.images, batch.task, batch.labels), "replay": torch.stack(stored).mean()}


def third(tasks: list[Task]) -> list[Task]:
    """The two tasks and one more with four classes."""
    images = noise_images(24, 50, 4, 100)
    return [*tasks, Task("task2", ("fox", "gnu", "hen", "ibis"), ("a photo of {}",), images, images, images)]


def test_replayed_images_compete_among_the_classes_of_their_task(tasks: list[Task]) -> None:
    tasks = third(tasks)
    method = learnt("replay", tasks, replay_weight=0.5)
    TaskTraining(method, 1, tasks).execute()
    method.before_task(2, tasks[2])
    batch = memory_batch(method, tasks[2], [0, 11, 3, 7, 8])
    source = method.reference_source(tasks[2])
    positions, labels = source.positions[batch.reference_indices], source.labels[batch.reference_indices]
    assert positions.unique().tolist() == [0, 1]
    logged = method.loss(batch)
    expected = separate_terms(method, tasks, batch, positions, labels)
    for name, value in expected.items():
        torch.testing.assert_close(logged[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged["loss"], expected["cross_entropy"] + 0.5 * expected["replay"])
    with pytest.raises(ValueError, match="batch: expected reference_images and reference_indices from the memory"):
        method.loss(Batch(batch.images, batch.labels, 0))


def test_icarl_distils_the_classes_of_earlier_tasks(tasks: list[Task]) -> None:
    tasks = third(tasks)
    method = learnt("icarl", tasks, distillation_weight=0.7)
    TaskTraining(method, 1, tasks).execute()
    teacher = method.backbone.frozen_copy()
    method.before_task(2, tasks[2])
    with torch.no_grad():
        for value in method.backbone.model.parameters():
            value.add_(0.05 * torch.randn(value.shape))
    batch = memory_batch(method, tasks[2], [0, 11, 3, 7, 3])
    images = torch.cat([batch.images, batch.reference_images])
    names = [name for task in tasks[:2] for name in task.class_names]
    texts = teacher.frozen_text_features(teacher.tokenize([f"a photo of {name}" for name in names]))
    scale = float(teacher.logit_scale)
    expected = clk.distill_kl(
        scale * method.backbone.encode_images(images) @ texts.T,
        scale * teacher.encode_images(images) @ texts.T,
        backend="reference",
    )
    for _ in range(2):  # the second time from the cache
        torch.testing.assert_close(method.loss(batch)["distillation"], 0.7 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aliased", [False, True])
def test_an_aliased_teacher_leaves_nothing_but_replay(aliased: bool, tasks: list[Task]) -> None:
    method = learnt("icarl", tasks, aliased_teacher=aliased)
    method.before_task(1, tasks[1])
    with torch.no_grad():
        for value in method.backbone.model.parameters():
            value.add_(0.05 * torch.randn(value.shape))
    term = method.loss(memory_batch(method, tasks[1], [0, 3]))["distillation"]
    gradient = torch.autograd.grad(term, [method.backbone.model.visual.proj])[0]
    assert (gradient.abs().max() < 1e-4) == aliased, float(gradient.abs().max())


def test_with_an_aliased_teacher_icarl_is_replay(tasks: list[Task]) -> None:
    """The same weights after two tasks as replay of the same images; with a teacher of its own, others."""
    ends = {}
    for kind, name, settings in (
        ("replay", "replay", {"selection": "herding"}),
        ("aliased", "icarl", {"aliased_teacher": True, "distillation_weight": 500.0}),
        ("own", "icarl", {"distillation_weight": 500.0}),
    ):
        method = build(name, lr=0.05, **settings)
        method.optimizer = lambda method=method: with_sgd(method, 0.05)
        for index in range(len(tasks)):
            TaskTraining(method, index, tasks).execute()
        ends[kind] = weights(method)
    start = weights(build("replay"))

    def apart(one: str, other: dict[str, Tensor]) -> float:
        return float(sum((ends[one][name] - value).square().sum() for name, value in other.items())) ** 0.5

    assert apart("aliased", ends["replay"]) < 1e-4 * apart("replay", start)
    assert apart("own", ends["replay"]) > 100 * apart("aliased", ends["replay"])
    assert apart("own", ends["replay"]) > 0.003 * apart("replay", start)


def test_the_nearest_mean_of_exemplars_classifies_what_was_learnt(tasks: list[Task]) -> None:
    method = learnt("icarl", tasks)
    images = torch.stack([transform(tasks[0].test.image(index)) for index in range(8)])
    features = method.backbone.encode_images(images)
    rows = method.memory.indices[0]
    exemplars = torch.stack([transform(tasks[0].train.image(row)) for row in rows.tolist()])
    labels = tasks[0].train.labels[rows]
    stored = method.backbone.encode_images(exemplars)
    means = torch.stack([F.normalize(stored[labels == label].mean(0), dim=0) for label in range(3)])
    nearest = torch.cdist(features, means).argmin(dim=1)
    method.before_evaluation()
    scores = method.logits(images, tasks[0])
    assert torch.equal(scores.argmax(dim=1), nearest)
    torch.testing.assert_close(scores, method.backbone.logit_scale * features @ means.T, rtol=1e-4, atol=1e-4)
    by_text = method.backbone.class_embeddings(tasks[1].class_names, tasks[1].templates)
    torch.testing.assert_close(method.logits(images, tasks[1]), method.backbone.logit_scale * features @ by_text.T)
    published = learnt("icarl", tasks, classifier="texts")
    own = published.backbone.class_embeddings(tasks[0].class_names, tasks[0].templates)
    torch.testing.assert_close(published.classifier(tasks[0]), own)


def test_exemplars_are_herded_in_feature_space(tasks: list[Task]) -> None:
    for name, settings in (("icarl", {}), ("replay", {"selection": "herding"})):
        method = learnt(name, tasks, **settings)
        features, labels = encode_source(method.backbone, tasks[0].train), tasks[0].train.labels
        for label in range(3):
            members = (labels == label).nonzero().squeeze(1)
            kept = method.memory.indices[0][labels[method.memory.indices[0]] == label]
            assert torch.equal(kept, members[herding(features[members], 4)])


class InterruptedHereError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("name", ["replay", "icarl"])
def test_interrupted_and_continued(name: str, tasks: list[Task]) -> None:
    """After a restart the images are found again, and the second task ends with the same state to the bit."""
    whole = learnt(name, tasks)
    between = state(whole)
    assert sum(value.numel() for key, value in between.items() if key.startswith("memory.")) == 12
    TaskTraining(whole, 1, tasks).execute()

    def resumed() -> Any:
        method = build(name)
        method.load_state_dict(between)
        method.recall(tasks[:1])
        return method

    stopped, kept = resumed(), []

    def stop(report: Any) -> None:
        if report.step == 1:
            kept.append(Continuation(2, state(stopped), report.optimizer.state_dict()))
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        TaskTraining(stopped, 1, tasks, on_step=stop).execute()
    continued = resumed()
    TaskTraining(continued, 1, tasks, continuation=kept[0]).execute()
    ends = [state(whole), state(continued)]
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
    with pytest.raises(RuntimeError, match="call load_state_dict and recall first"):
        TaskTraining(build(name), 1, tasks).execute()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("replay", {"memory": 0}, "memory: expected a number of images >= 1, got 0"),
        ("replay", {"replay_weight": -1.0}, "replay_weight: expected a number >= 0, got -1"),
        ("replay", {"selection": "best"}, "selection: expected one of random, herding, got 'best'"),
        ("icarl", {"classifier": "best"}, "classifier: expected one of exemplar_means, texts, got 'best'"),
        ("icarl", {"temperature": 0.0}, "temperature: expected a number > 0, got 0"),
        ("icarl", {"distillation_weight": -1.0}, "distillation_weight: expected a number >= 0, got -1"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **settings)
    assert METHODS[name].default_config("mtil").memory == 10_000

"""Heads on random features: least squares as it should be, what is scored by whom, and states that can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_clip import build_backbone, transform
from torch import Tensor

from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch
from cl_methods.methods.loranpac import least_squares, update_svd
from cl_methods.methods.random_features import RandomFeatureMethod
from cl_methods.methods.ranpac import choose_ridge, normal_equations, solve_ridge

NAMES = ["ranpac", "loranpac"]
SETTINGS = {"ranpac": {"width": 40}, "loranpac": {"width": 60, "rank": 30, "block": 7}}


def build(name: str, **changes: object) -> RandomFeatureMethod:
    method = METHODS[name](build_backbone(), METHODS[name].Config(**{**SETTINGS[name], **changes}))
    assert isinstance(method, RandomFeatureMethod)
    return method


def stack(source: object) -> Tensor:
    return torch.stack([transform(source.image(row)) for row in range(len(source))])


def learn(method: RandomFeatureMethod, index: int, task: Task, batch: int = 10) -> None:
    torch.manual_seed(index)
    method.before_task(index, task)
    for step, rows in enumerate(torch.arange(len(task.train)).split(batch)):
        method.learn(Batch(stack(task.train)[rows], task.train.labels[rows], step, task=task))
    method.after_task(index, task)


def lifted(method: RandomFeatureMethod, tasks: list[Task]) -> tuple[Tensor, Tensor]:
    """(N, M) random features of all training images in float64, and their classes (N, 5) as indicators."""
    features = method.backbone.encode_images(torch.cat([stack(task.train) for task in tasks])).double()
    labels = torch.cat([tasks[0].train.labels, tasks[1].train.labels + 3])
    return (features @ method.stored("projection").double()).relu(), torch.eye(5, dtype=torch.float64)[labels]


def test_ranpac_is_ridge_regression_on_all_tasks(tasks: list[Task]) -> None:
    method = build("ranpac", ridge_exponents=(0, 0))
    for index, task in enumerate(tasks):
        learn(method, index, task)
    rows, targets = lifted(method, tasks)
    expected = torch.linalg.solve(rows.T @ rows + torch.eye(40), rows.T @ targets).T
    torch.testing.assert_close(method.stored("weight").double(), expected, rtol=1e-4, atol=1e-5)
    images = stack(tasks[1].test)
    right = method.head_scores(method.backbone.encode_images(images)).argmax(dim=1) == tasks[1].test.labels + 3
    assert right.float().mean() > 0.5  # among five classes, guessing is 0.2


def test_neither_the_order_of_tasks_nor_the_batches_matter(tasks: list[Task]) -> None:
    first, second = build("ranpac", ridge_exponents=(0, 0)), build("ranpac", ridge_exponents=(0, 0))
    for index in (0, 1):
        learn(first, index, tasks[index])
        learn(second, index, tasks[1 - index], batch=7)
    rows = [first.class_names.index(name) for name in second.class_names]
    torch.testing.assert_close(second.stored("weight"), first.stored("weight")[rows], rtol=1e-4, atol=1e-5)


def test_loranpac_without_truncation_is_least_squares_of_least_norm(tasks: list[Task]) -> None:
    method = build("loranpac", truncated=0.0, width=100, rank=100)
    method.before_task(0, tasks[0])
    generator = torch.Generator().manual_seed(2)
    features, labels = torch.randn(48, 16, generator=generator), torch.arange(48) % 5
    for rows, classes in ((slice(0, 18), 5), (slice(18, 48), 5)):
        method._tensors |= method.fit(features[rows], labels[rows], classes)
    assert method.stored("values").shape == (48,)  # one for each image, fewer than features
    assert int(method.stored("images")) == 48
    lifted_rows, targets = method.lift(features).double(), torch.eye(5, dtype=torch.float64)[labels]
    torch.testing.assert_close(lifted_rows @ method.stored("weight").T.double(), targets, rtol=0, atol=1e-3)
    expected = (torch.linalg.pinv(lifted_rows) @ targets).T
    torch.testing.assert_close(method.stored("weight").double(), expected, rtol=1e-2, atol=1e-4)


def test_loranpac_keeps_as_many_singular_values_as_its_settings_say(tasks: list[Task]) -> None:
    generator = torch.Generator().manual_seed(2)
    for settings, counts in (
        ({"truncated": 0.25, "rank": 100, "width": 100, "block": 8}, (9, 18, 27)),
        ({"truncated": 0.5, "rank": 10, "width": 100, "block": 100}, (6, 10, 10)),
        ({"truncated": 0.25, "rank": 100, "width": 20, "block": 5}, (9, 15, 15)),
    ):
        method = build("loranpac", **settings)
        method.before_task(0, tasks[0])
        for kept in counts:
            method._tensors |= method.fit(torch.randn(12, 16, generator=generator), torch.arange(12) % 5, 5)
            assert method.stored("values").shape == (kept,)
            assert method.stored("vectors").shape == (settings["width"], kept)


@pytest.mark.parametrize("count", [30, 90])
def test_the_chosen_ridge_has_the_smallest_error_of_separate_solutions(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    projection = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    targets = torch.eye(3, dtype=torch.float64)[torch.randint(3, (count,), generator=generator)]
    ridges = [10.0**exponent for exponent in range(-4, 5)]

    def lift(some: Tensor) -> Tensor:
        return (some @ projection).relu()

    split = int(count * 0.8)
    gram, prototypes = normal_equations(lift, features[:split], targets[:split])
    errors = []
    for ridge in ridges:
        outputs = lift(features[split:]) @ solve_ridge(gram, prototypes, ridge)
        errors.append(float((outputs - targets[split:]).square().mean()))
    best = errors.index(min(errors))
    assert 0 < best < len(ridges) - 1  # an inner one, so that the choice says something
    assert choose_ridge(lift, features, targets, ridges) == ridges[best]


def test_normal_equations_of_more_rows_than_a_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(5000, 3, generator=generator, dtype=torch.float64)
    targets = torch.rand(5000, 2, generator=generator, dtype=torch.float64)
    gram, prototypes = normal_equations(torch.sin, features, targets)
    torch.testing.assert_close(gram, features.sin().T @ features.sin())
    torch.testing.assert_close(prototypes, features.sin().T @ targets)


def test_an_indefinite_gram_matrix_is_still_solved_and_not_changed() -> None:
    gram = torch.diag(torch.tensor([2.0, -1e-6, 1.0], dtype=torch.float64))
    before, prototypes = gram.clone(), torch.ones(3, 1, dtype=torch.float64)
    solution = solve_ridge(gram, prototypes, 1e-8)
    torch.testing.assert_close((gram + 1e-8 * torch.eye(3, dtype=torch.float64)) @ solution, prototypes)
    assert torch.equal(gram, before)


def test_held_out_needs_images_on_both_sides() -> None:
    for count, held_out in ((1, 0.2), (5, 0.0), (5, 1.0)):
        with pytest.raises(ValueError, match=rf"held_out: {held_out} of {count} images"):
            choose_ridge(torch.relu, torch.ones(count, 2), torch.ones(count, 1), [1.0], held_out)


@pytest.mark.parametrize("blocks", [[5], [1, 6, 3], [20, 20], [3, 50]])
def test_updated_svd_is_the_svd_of_all_rows(blocks: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(block, 30, generator=generator, dtype=torch.float64) for block in blocks]
    rows[-1][0] = rows[0][0]  # the same image twice
    vectors, values = torch.zeros(30, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for block in rows:
        vectors, values = update_svd(vectors, values, block, 30)
    whole = torch.cat(rows)
    expected = torch.linalg.svdvals(whole)
    rank = int(torch.linalg.matrix_rank(whole))
    assert vectors.shape == (30, rank)
    torch.testing.assert_close(values, expected[:rank])
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64))
    targets = torch.randn(len(whole), 4, generator=generator, dtype=torch.float64)
    solution = least_squares(vectors, values, whole.T @ targets)
    torch.testing.assert_close(solution, torch.linalg.pinv(whole) @ targets)


def test_truncated_updates_follow_the_recurrence() -> None:
    """Each step keeps the best approximation of what it kept before together with the new rows."""
    generator = torch.Generator().manual_seed(4)
    vectors, values = torch.zeros(25, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    kept = torch.zeros(25, 0, dtype=torch.float64)
    for rank in (4, 7, 9, 9):
        rows = torch.randn(6, 25, generator=generator, dtype=torch.float64)
        left, found, _ = torch.linalg.svd(torch.cat([kept, rows.T], dim=1), full_matrices=False)
        kept = left[:, :rank] * found[:rank]
        vectors, values = update_svd(vectors, values, rows, rank)
        torch.testing.assert_close(values, found[:rank])
        torch.testing.assert_close((vectors * values) @ (vectors * values).T, kept @ kept.T)


def test_vectors_stay_orthonormal_over_many_updates_in_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    vectors, values = torch.zeros(80, 0), torch.zeros(0)
    for _ in range(60):
        rows = (torch.randn(8, 12, generator=generator) @ torch.randn(12, 80, generator=generator)).relu()
        vectors, values = update_svd(vectors, values, rows, 50)
    assert (vectors.T @ vectors - torch.eye(50)).abs().max() < 1e-4
    assert torch.equal(values, values.sort(descending=True).values)


def test_rows_of_zeros_give_no_vector_and_a_head_of_zeros() -> None:
    vectors, values = update_svd(torch.zeros(6, 0), torch.zeros(0), torch.zeros(3, 6), 2)
    assert (vectors.shape, values.shape) == ((6, 0), (0,))
    assert torch.equal(least_squares(vectors, values, torch.zeros(6, 2)), torch.zeros(6, 2))


@pytest.mark.parametrize("name", NAMES)
def test_who_scores_which_class(name: str, tasks: list[Task]) -> None:
    method, plain = build(name), METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    images = stack(tasks[0].test)
    learn(method, 0, tasks[0])
    assert torch.equal(method.logits(images, tasks[1]), plain.logits(images, tasks[1]))
    zero_shot, scores = plain.logits(images, tasks[0]), method.logits(images, tasks[0])
    torch.testing.assert_close(
        scores.logsumexp(dim=1), zero_shot.logsumexp(dim=1)
    )  # shared out among the learnt classes
    head = method.head_scores(method.backbone.encode_images(images))
    assert torch.equal(scores.argsort(dim=1), head.argsort(dim=1))
    assert not torch.equal(scores.argsort(dim=1), zero_shot.argsort(dim=1))
    mixed = replace(tasks[0], class_names=("dog", "cat", "ant"))
    found = method.logits(images, mixed)
    assert torch.equal(found[:, 0], plain.logits(images, mixed)[:, 0])
    assert torch.equal(found[:, 1:], scores[:, [2, 0]])


@pytest.mark.parametrize("name", NAMES)
def test_tasks_share_classes_of_the_same_name(name: str, tasks: list[Task]) -> None:
    method = build(name)
    learn(method, 0, tasks[0])
    learn(method, 1, replace(tasks[1], class_names=("bee", "eel")))
    assert method.class_names == ["ant", "bee", "cat", "eel"]
    assert method.stored("weight").shape == (4, method.config.width)
    assert method.stored("texts").shape[0] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_images_gets_a_head_of_zeros(name: str, tasks: list[Task]) -> None:
    method = build(name)
    learn(method, 0, replace(tasks[0], class_names=("ant", "bee", "cat", "fox")))
    assert not method.stored("weight")[3].any()
    assert method.stored("weight")[:3].any(dim=1).all()
    assert method.logits(stack(tasks[0].test), tasks[0]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("interrupted", [0, 1])
def test_resuming_inside_a_task_changes_no_bit(name: str, interrupted: int, tasks: list[Task]) -> None:
    whole, method = build(name), build(name)
    for index, task in enumerate(tasks):
        learn(whole, index, task)
    batches = [stack(tasks[interrupted].train)[rows] for rows in torch.arange(24).split(10)]
    labels = tasks[interrupted].train.labels.split(10)
    if interrupted:
        learn(method, 0, tasks[0])
    between = method.state_dict()
    torch.manual_seed(interrupted)
    method.before_task(interrupted, tasks[interrupted])
    method.learn(Batch(batches[0], labels[0], 0))
    inside = {key: value.clone() for key, value in method.state_dict().items()}
    resumed = build(name)
    if between:
        resumed.load_state_dict(between)
    torch.manual_seed(7)  # the projection comes from the state
    resumed.before_task(interrupted, tasks[interrupted])
    resumed.load_state_dict(inside)
    for step in (1, 2):
        resumed.learn(Batch(batches[step], labels[step], step))
    resumed.after_task(interrupted, tasks[interrupted])
    if not interrupted:
        learn(resumed, 1, tasks[1])
    found = resumed.state_dict()
    assert found.keys() == whole.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(found[key], value), key
    images = stack(tasks[0].test)
    assert torch.equal(resumed.logits(images, tasks[0]), whole.logits(images, tasks[0]))


@pytest.mark.parametrize("name", NAMES)
def test_clip_is_left_alone(name: str, tasks: list[Task]) -> None:
    method, untouched = build(name), build_backbone().model.state_dict()
    learn(method, 0, tasks[0])
    assert not any(parameter.requires_grad for parameter in method.backbone.model.parameters())
    for key, value in method.backbone.model.state_dict().items():
        assert torch.equal(value, untouched[key]), key


def test_wrong_states_and_calls(tasks: list[Task], batches: Callable[..., list[Batch]]) -> None:
    method = build("ranpac")
    with pytest.raises(RuntimeError, match="expected the tensors of ranpac, found nothing"):
        method.load_state_dict({})
    with pytest.raises(RuntimeError, match="expected the tensors of ranpac, found projection, vectors"):
        method.load_state_dict({"projection": torch.zeros(16, 40), "vectors": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="its projection has width 41, the settings say 40"):
        method.load_state_dict({"projection": torch.zeros(16, 41)})
    with pytest.raises(RuntimeError, match="ranpac has no loss"):
        method.loss(batches()[0])
    method.before_task(0, tasks[0])
    with pytest.raises(RuntimeError, match="give the batches of task task0 to learn"):
        method.after_task(0, tasks[0])
    with pytest.raises(NotImplementedError, match="finetune learns by optimiser steps"):
        METHODS["finetune"](build_backbone(), METHODS["finetune"].Config()).learn(batches()[0])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ranpac", "width", 0),
        ("ranpac", "batch_size", 0),
        ("ranpac", "held_out", 1.5),
        ("ranpac", "ridge_exponents", (3, -3)),
        ("loranpac", "rank", 0),
        ("loranpac", "block", 0),
        ("loranpac", "truncated", 1.0),
    ],
)
def test_settings_are_checked(name: str, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        METHODS[name].Config(**{field: value})

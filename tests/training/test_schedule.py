"""The learning-rate schedule against the published rule, and its ends."""

import math

import pytest

from cl_methods.seeding import derive_seed, step_seed
from cl_methods.training.schedule import warmup_cosine


def test_follows_the_published_rule():
    iterations, warmup, lr = 1000, 100, 1e-5
    for step in (0, 1, 99):
        assert warmup_cosine(lr, step, iterations, warmup) == pytest.approx(lr * (step + 1) / warmup, rel=1e-12)
    for step in (100, 101, 550, 999):
        expected = 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / (iterations - warmup)))
        assert warmup_cosine(lr, step, iterations, warmup) == pytest.approx(expected, rel=1e-12)
    assert warmup_cosine(lr, 99, iterations, warmup) == lr == warmup_cosine(lr, 100, iterations, warmup)
    assert warmup_cosine(lr, iterations, iterations, warmup) == 0


def test_a_task_as_long_as_its_warmup_ends_at_zero_and_a_shorter_one_inside_it():
    assert [warmup_cosine(1.0, step, 2, 2) for step in range(3)] == [0.5, 1.0, 0.0]
    assert [warmup_cosine(1.0, step, 2, 4) for step in range(3)] == [0.25, 0.5, 0.75]
    assert warmup_cosine(1.0, 0, 0, 0) == 0.0


def test_refuses_steps_outside_the_task():
    with pytest.raises(ValueError, match="step: expected 0 to iterations = 10, got 11"):
        warmup_cosine(1.0, 11, 10, 2)
    with pytest.raises(ValueError, match="warmup"):
        warmup_cosine(1.0, 0, 10, -1)


def test_seeds_differ_in_every_component():
    seeds = {step_seed(seed, task, step) for seed in range(4) for task in range(4) for step in range(4)}
    assert len(seeds) == 64
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= value < 2**63 for value in seeds)

"""The loop: steps, schedule, hooks, seeding, resuming in the middle, and losses that are not finite."""

from __future__ import annotations

import pytest
import torch
from fakes import TinyConfig, TinyMethod, tiny_backbone

from cl_methods.methods.base import Batch
from cl_methods.training.loop import NonFiniteLossError, train_on_batches
from cl_methods.training.schedule import warmup_cosine


def make_batches(count: int, start: int = 0):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 8, 3, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (count, 8), generator=generator)
    return [Batch(images=images[step], labels=labels[step], step=step) for step in range(start, count)]


def make_method() -> TinyMethod:
    torch.manual_seed(0)
    method = TinyMethod(tiny_backbone(), TinyConfig())
    method.before_task(0, None)
    return method


def train(method: TinyMethod, batches: list[Batch], **options):
    settings = {"iterations": 6, "warmup": 2, "lr": 1e-2, "seed": 3, "task_index": 0, **options}
    return train_on_batches(method, batches, **settings)


def test_does_one_more_step_than_iterations_with_the_schedule_and_the_hooks_in_order():
    calls: list[str] = []
    method = make_method()
    for hook in ("loss", "before_step", "after_step"):
        original = getattr(method, hook)
        setattr(method, hook, lambda value, hook=hook, original=original: (calls.append(hook), original(value))[1])
    rates, samples = [], []
    train(method, make_batches(9), on_step=lambda report: (rates.append(report.lr), samples.append(report.samples)))
    assert rates == [warmup_cosine(1e-2, step, 6, 2) for step in range(7)]
    assert calls == ["loss", "before_step", "after_step"] * 7
    assert samples == [8] * 7


def test_stopping_and_continuing_equals_not_stopping_to_the_bit():
    whole = make_method()
    train(whole, make_batches(7))

    class StopError(Exception):
        pass

    def stop_after_third(report):
        if report.step == 2:
            raise StopError

    first = make_method()
    optimizer = first.optimizer()
    with pytest.raises(StopError):
        train(first, make_batches(7), optimizer=optimizer, on_step=stop_after_third)
    second = make_method()
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    resumed = second.optimizer()
    resumed.load_state_dict(optimizer.state_dict())
    torch.manual_seed(12345)
    train(second, make_batches(7, start=3), start_step=3, optimizer=resumed)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_seed_and_task_change_the_random_numbers():
    results = []
    for seed, task_index in ((3, 0), (3, 0), (4, 0), (3, 1)):
        method = make_method()
        train(method, make_batches(7), seed=seed, task_index=task_index)
        results.append(method.backbone.model.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_a_loss_that_is_not_finite_names_task_step_and_terms():
    batches = make_batches(7)
    batches[4].images.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"step 4 of task letters: loss = nan, ce = nan"):
        train(make_method(), batches, task_name="letters")


def test_too_few_batches_are_an_error():
    with pytest.raises(ValueError, match="batches: ended before step 5"):
        train(make_method(), make_batches(5))


def test_groups_can_scale_the_learning_rate():
    method = make_method()
    model = method.backbone.model
    groups = [{"params": [model.weight], "lr_scale": 0.0}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    train(method, make_batches(7), optimizer=optimizer)
    assert torch.equal(model.weight, before[0])
    assert not torch.equal(model.bias, before[1])

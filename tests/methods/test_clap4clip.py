"""CLAP4CLIP as a method: what trains when, its memory, what a prediction depends on, restarting, and its settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_adapters import SYNCHRONISING, OperatorNames
from test_replay_and_icarl import third
from tiny_clip import build_backbone, transform
from torch import Tensor
from trained import state

from cl_methods.components.uncertainty import by_uncertainty, uncertainty
from cl_methods.datasets.task import Task
from cl_methods.evaluation.accuracy import EvaluationOptions, measure_spaces
from cl_methods.evaluation.novelty import novelty_of_later_tasks, novelty_tally
from cl_methods.methods import CLAP4CLIP, METHODS, Batch
from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.variational_adapters import VariationalHead
from cl_methods.training.task import Continuation, TaskTraining

SMALL: dict[str, Any] = {
    "lr": 0.05,
    "iterations": 3,
    "warmup": 1,
    "batch_size": 6,
    "fine_tuning_iterations": 2,
    "memory": 12,
    "samples": 4,
    "attention_hidden": 24,
}


def build(**settings: Any) -> CLAP4CLIP:
    return CLAP4CLIP(build_backbone(), ClapConfig(**{**SMALL, **settings}))


def learnt(tasks: list[Task], count: int = 2, **settings: Any) -> CLAP4CLIP:
    method = build(**settings)
    for index in range(count):
        TaskTraining(method, index, tasks).execute()
    method.before_evaluation()
    return method


def evaluation_images(task: Task, count: int = 7) -> Tensor:
    return torch.stack([transform(task.test.image(index)) for index in range(count)])


def test_what_trains_in_each_stage(tasks: list[Task]) -> None:
    """First the attention and the new adapter on the task and the memory, then every adapter on the memory alone."""
    method = learnt(tasks, 1, lr=0.01)
    seen: list[tuple[str, set[str], dict[str, Tensor], Batch | None]] = []
    plain = method.loss

    def loss(batch: Batch) -> dict[str, Tensor]:
        assert method.stage is not None
        names = {name for name, _ in method.trainable()}
        seen.append((method.stage.name, names, state(method), batch))
        return plain(batch)

    method.loss = loss  # type: ignore[method-assign]
    TaskTraining(method, 1, tasks).execute()
    assert [stage for stage, *_ in seen] == ["train"] * 4 + ["fine_tuning"] * 3
    changed = [moved(seen[0][2], seen[4][2]), moved(seen[4][2], state(method))]
    assert changed[0] == seen[0][1]
    assert {name.split(".")[0] for name in changed[0]} == {"attention", "adapters"}
    assert not any(name.startswith("adapters.0.") for name in changed[0])
    assert changed[1] == {f"adapters.{place}.{part}" for place in range(2) for part in ("weight", "bias")} == seen[4][1]
    labels = [{int(label) for *_, batch in seen[part] for label in batch.labels} for part in (slice(4), slice(4, 7))]
    assert all(found & {0, 1, 2} and found & {3, 4} for found in labels)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Which trained tensors differ."""
    return {
        name
        for name in before
        if name.startswith(("attention", "adapters")) and not torch.equal(before[name], after[name])
    }


def test_images_of_the_stages(tasks: list[Task]) -> None:
    method = learnt(tasks, 1, memory_per_class=2)
    assert len(method.memory) == 6
    method.before_task(1, tasks[1])
    first, second = method.stages(tasks[1])
    assert (second.name, second.lr, second.steps) == ("fine_tuning", pytest.approx(0.005), 3)
    method.stage = first
    method.before_stage(first)
    union = method.training_images(tasks[1])
    assert len(union) == 6 + len(tasks[1].train)
    assert torch.equal(union.labels[:6], tasks[0].train.labels[method.memory.indices[0]])
    assert torch.equal(union.labels[6:], tasks[1].train.labels + 3)
    assert torch.equal(union.image(6), tasks[1].train.image(0))
    method.stage = second
    method.before_stage(second)
    balanced = method.training_images(tasks[1])
    assert balanced.labels.bincount().tolist() == [2] * 5
    method.after_task(1, tasks[1])
    assert method.memory.source().labels.bincount().tolist() == [4, 4, 2]


def test_without_the_second_stage(tasks: list[Task]) -> None:
    method = build(fine_tuning_iterations=0)
    assert [stage.name for stage in method.stages(tasks[0])] == ["train"]
    TaskTraining(method, 0, tasks).execute()
    assert len(method.memory) == 12


@pytest.mark.parametrize("kind", ["entropy", "energy", "variance", "confidence"])
@pytest.mark.parametrize("keep", ["uncertain", "certain"])
def test_memory_by_uncertainty(kind: Any, keep: Any, tasks: list[Task]) -> None:
    """Each image by its own draws: those of one image are never mixed with another's."""
    method = learnt(tasks, 1, selection=kind, keep=keep, fine_tuning_iterations=0)
    every = torch.stack([transform(tasks[0].train.image(index)) for index in range(len(tasks[0].train))])
    values = torch.cat([uncertainty(method.sampled_logits(image[None], tasks[0], 4), kind) for image in every])
    labels, kept = tasks[0].train.labels, method.memory.indices[0]
    for label in range(3):
        members = (labels == label).nonzero().squeeze(1).tolist()
        expected = sorted(members, key=lambda row: float(values[row]), reverse=keep == "uncertain")[:4]
        assert kept[labels[kept] == label].tolist() == expected


def test_selection_by_uncertainty() -> None:
    values = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0])
    rows = torch.tensor([0, 1, 3, 4])
    assert by_uncertainty(values)(rows, 3).tolist() == [1, 3, 0]
    assert by_uncertainty(values, "certain")(rows, 2).tolist() == [4, 0]
    assert by_uncertainty(values)(rows, 9).tolist() == [1, 3, 0, 4]
    with pytest.raises(ValueError, match="keep: expected uncertain or certain, got 'all'"):
        by_uncertainty(values, "all")  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [0, 5])
def test_what_a_prediction_depends_on(samples: int, tasks: list[Task]) -> None:
    """On the image alone, or on what is scored with it; never on how many tasks follow or on what was scored before."""
    for scope in ("sample", "batch"):
        method = learnt(tasks, scope=scope, evaluation_samples=samples)
        images = evaluation_images(tasks[0])
        together = method.logits(images, tasks[0])
        alone = torch.cat([method.logits(image[None], tasks[0]) for image in images])
        apart = float((together - alone).abs().max())
        assert apart < 1e-3 if scope == "sample" else apart > 1e-2, (scope, apart)
        assert torch.equal(method.logits(images, tasks[0]), together)
        single = build(scope="batch", evaluation_samples=samples)
        single.load_state_dict(state(method))
        torch.testing.assert_close(single.logits(images[:1], tasks[0]), alone[:1], rtol=1e-4, atol=1e-4)


def test_many_images_are_scored_in_parts(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    method, images = learnt(tasks), evaluation_images(tasks[0])
    whole = method.logits(images, tasks[0])
    monkeypatch.setattr("cl_methods.methods.clap4clip._ROWS", 6)
    torch.testing.assert_close(method.logits(images, tasks[0]), whole, rtol=1e-5, atol=1e-4)


def test_draws_approach_their_mean(tasks: list[Task]) -> None:
    method, images = learnt(tasks), evaluation_images(tasks[1])
    draws = method.sampled_logits(images, tasks[1], 4000)
    assert draws.shape == (4000, 7, 2)
    error = (draws.mean(0) - method.logits(images, tasks[1])).abs() / draws.std(0)
    assert error.max() < 5 / 4000**0.5
    assert draws.std(0).min() > 1e-2
    hierarchical = learnt(tasks, hierarchical=True, global_samples=3)
    assert hierarchical.sampled_logits(images, tasks[1], 5).shape == (15, 7, 2)


def test_draws_tell_known_images_from_novel_ones(tasks: list[Task]) -> None:
    """What ``clk run --evaluation.novelty`` measures is what the draws of ``sampled_logits`` give."""
    method, options = learnt(tasks, 1, samples=3), EvaluationOptions(novelty=("variance", "entropy"))
    tally = novelty_tally(method, tasks, 1, options)
    measure_spaces(method, tasks, 1, options, novelty=tally)
    for kind, (found,) in tally.found().items():
        expected = novelty_of_later_tasks(
            method, tasks, 1, kind, scores=lambda images, task: method.sampled_logits(images, task, 3)
        )
        assert found == pytest.approx(expected)
        assert found["auroc"] > 0.5


def test_tasks_that_were_not_learnt_are_zero_shot(tasks: list[Task]) -> None:
    method, images = learnt(tasks, 1), evaluation_images(tasks[1])
    plain = METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    assert torch.equal(method.logits(images, tasks[1]), plain.logits(images, tasks[1]))
    assert not torch.allclose(method.logits(images, tasks[0]), plain.logits(images, tasks[0]), atol=1e-2)
    with pytest.raises(ValueError, match="task: expected one of the learnt ones, task0, got task1"):
        method.sampled_logits(images, tasks[1], 3)


@pytest.mark.parametrize("samples", [0, 3])
def test_learnt_and_other_classes_on_one_scale(samples: int, tasks: list[Task]) -> None:
    """All learnt classes together get what zero-shot CLIP gives them, and share it as their own scores say."""
    tasks = third(tasks)
    method, images = learnt(tasks, evaluation_samples=samples), evaluation_images(tasks[0])
    scaled = build(evaluation_samples=samples, one_scale=True)
    scaled.load_state_dict(state(method))
    plain = METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    own, found, zero_shot = (
        torch.cat([one.logits(images, task) for task in tasks[:2]], dim=1) for one in (method, scaled, plain)
    )
    torch.testing.assert_close(found.softmax(dim=1), own.softmax(dim=1))
    torch.testing.assert_close(found.logsumexp(dim=1), zero_shot.logsumexp(dim=1))
    assert torch.equal(scaled.logits(images, tasks[2]), plain.logits(images, tasks[2]))


@pytest.mark.parametrize("hierarchical", [False, True])
def test_state_of_another_instance(hierarchical: bool, tasks: list[Task]) -> None:
    method, other = learnt(tasks, hierarchical=hierarchical), build(hierarchical=hierarchical)
    assert other.state_dict() == {}
    other.load_state_dict({})
    other.load_state_dict(state(method))
    other.recall(tasks)
    for task in tasks:
        assert torch.equal(other.logits(evaluation_images(task), task), method.logits(evaluation_images(task), task))
    assert not any(name.startswith(("visual", "transformer")) for name in other.state_dict())
    with pytest.raises(RuntimeError, match=r"state: expected the tensors of clap4clip, found some\.weight"):
        other.load_state_dict({"some.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="shared"):
        build(hierarchical=not hierarchical).load_state_dict(state(method))


@pytest.mark.parametrize("done", [2, 4, 6])
def test_interrupted_and_continued(done: int, tasks: list[Task]) -> None:
    """In either stage, or between them; and the same run twice ends with the same bits."""
    kept: list[Continuation] = []

    def keep(report: Any) -> None:
        if report.step + 1 == done:
            kept.append(Continuation(done, state(whole), copy.deepcopy(report.optimizer.state_dict())))

    whole = learnt(tasks, 1, momentum=0.5, selection="random")
    between = state(whole)
    TaskTraining(whole, 1, tasks, on_step=keep).execute()
    again = learnt(tasks, 2, momentum=0.5, selection="random")
    resumed = build(momentum=0.5, selection="random")
    resumed.load_state_dict(between)
    resumed.recall(tasks[:1])
    TaskTraining(resumed, 1, tasks, continuation=kept[0]).execute()
    for other in (again, resumed):
        assert other.state_dict().keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    forgetful = build()
    forgetful.load_state_dict(between)
    with pytest.raises(RuntimeError, match="call load_state_dict and recall first"):
        forgetful.before_task(1, tasks[1])


def test_a_third_task_after_a_restart(tasks: list[Task]) -> None:
    """Adapters of earlier tasks have changed in between, in place in the one and by loading in the other."""
    tasks = third(tasks)
    whole, resumed = learnt(tasks), build()
    resumed.load_state_dict(state(whole))
    resumed.recall(tasks[:2])
    for method in (whole, resumed):
        TaskTraining(method, 2, tasks).execute()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("settings", [{}, {"prior": "data_driven", "hierarchical": True}])
def test_a_step_never_waits_for_the_device(settings: dict[str, Any], tasks: list[Task]) -> None:
    method = learnt(tasks, 1, **settings)
    method.before_task(1, tasks[1])
    images = torch.stack([transform(tasks[1].train.image(index)) for index in range(6)])
    batch = Batch(images, tasks[1].train.labels[:6] + 3, 0)
    for stage in method.stages(tasks[1]):
        method.stage = stage
        method.before_stage(stage)
        optimizer = method.optimizer()
        with OperatorNames() as operators:
            optimizer.zero_grad(set_to_none=True)
            method.loss(batch)["loss"].backward()
            method.before_step(batch)
            optimizer.step()
            method.after_step(0)
        assert "aten::native_layer_norm" in operators.names
        assert not operators.names & SYNCHRONISING, operators.names & SYNCHRONISING


def test_nothing_of_clip_trains(tasks: list[Task]) -> None:
    method = build()
    with pytest.raises(RuntimeError, match="clap4clip: call before_task"):
        method.trainable()
    before = {name: value.clone() for name, value in method.backbone.model.state_dict().items()}
    TaskTraining(method, 0, tasks).execute()
    for name, value in method.backbone.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(value.requires_grad for value in method.backbone.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, got 'lion'"),
        ({"scope": "task"}, "scope: expected one of sample, batch, got 'task'"),
        ({"initialisation": "zero"}, "initialisation: expected one of language_aware, random, got 'zero'"),
        ({"prior": "flat"}, "prior: expected one of standard_normal, data_driven, language_aware, got 'flat'"),
        (
            {"selection": "best"},
            "selection: expected one of random, herding, confidence, energy, entropy, variance, got 'best'",
        ),
        ({"keep": "all"}, "keep: expected one of uncertain, certain, got 'all'"),
        ({"samples": 0}, "samples: expected a number >= 1, got 0"),
        ({"memory": 0}, "memory: expected a number >= 1, got 0"),
        ({"kl_weight": -1.0}, "kl_weight: expected a number >= 0, got -1"),
        ({"past_task_weight": -1.0}, "past_task_weight: expected a number >= 0, got -1"),
        ({"evaluation_samples": -1}, "evaluation_samples: expected a number >= 0, got -1"),
        ({"attention_dropout": 1.0}, "attention_dropout: expected 0 <= value < 1, got 1"),
        ({"prior_context": 0.0}, "prior_context: expected 0 < value <= 1, got 0"),
        ({"fine_tuning_lr_factor": 0.0}, "fine_tuning_lr_factor: expected a number > 0, got 0"),
        ({"prior": "data_driven", "visual_attention": False}, "prior: 'data_driven' is made by the visual attention"),
        ({"selection": "variance", "samples": 1}, "selection: the variance of draws needs samples >= 2, got 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClapConfig(**settings)


def test_the_memory_must_hold_every_class(tasks: list[Task]) -> None:
    with pytest.raises(
        ValueError, match="memory: expected at least one image for each of the 3 classes up to task task0"
    ):
        build(memory=2).before_task(0, tasks[0])


def test_trainable_parameters_at_full_width() -> None:
    """512 numbers a feature, ten tasks: what docs/methods/clap4clip.md says; the paper says about 9.5 million."""
    head = VariationalHead(512, ClapConfig(), torch.device("cpu"))
    assert sum(value.numel() for value in head.parameters()) == 4_204_032
    head.add_task(torch.randn(2, 3, 512))
    assert sum(value.numel() for value in head.adapters.parameters()) == 525_312

"""Novel images are those of tasks to come, scored among the classes of the tasks that were learnt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Task
from cl_methods.evaluation.accuracy import EvaluationOptions, measure_row, measure_spaces
from cl_methods.evaluation.boards import arrange
from cl_methods.evaluation.novelty import check_novelty, novelty_of_later_tasks, novelty_tally
from cl_methods.evaluation.results import ResultError, read_result
from cl_methods.evaluation.tables import novelty_table
from cl_methods.evaluation.uncertainty import novelty_detection
from cl_methods.methods.base import Method


class Linear(Method):
    """Fixed random scores for each class name."""

    name = "linear"

    def __init__(self) -> None:
        self.backbone = SimpleNamespace(
            micro_batches=None,
            eval_transform=lambda image: image.float() / 255,
            device=torch.device("cpu"),
            model=torch.nn.Identity(),
        )
        self._classifiers, self._expected = {}, ()
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


def separations(method: Linear, kind: str, learnt: int) -> dict[str, float]:
    """The definition: every test image scored among the classes of the first ``learnt`` tasks."""
    scores = [
        torch.cat([method.logits(task.test.images.float() / 255, one) for one in TASKS[:learnt]], 1) for task in TASKS
    ]
    return novelty_detection(torch.cat(scores[:learnt]), torch.cat(scores[learnt:]), kind)


@pytest.mark.parametrize("space", ["task", "seen"])
def test_the_pass_that_gives_accuracies_gives_novelty_too(space):
    """In the row before any task every split of the sequence, later the present one; after the last task nothing is novel."""
    method, options = Linear(), EvaluationOptions(label_space=space, novelty=("entropy", "energy"), batch_size=2)
    for learnt, splits in ((0, (1, 2)), (1, (1,)), (2, (2,))):
        tally = novelty_tally(method, TASKS, learnt, options)
        alone = measure_row(method, TASKS, learnt, options)
        assert measure_spaces(method, TASKS, learnt, options, novelty=tally)[space] == alone
        found = tally.found()
        assert list(found) == ["entropy", "energy"]
        for kind, measured in found.items():
            assert measured == [pytest.approx(separations(method, kind, split)) for split in splits]
    assert novelty_tally(method, TASKS, 3, options) is None
    assert novelty_tally(method, TASKS, 1, EvaluationOptions()) is None


def test_methods_that_draw_are_asked_for_draws():
    class Drawn(Linear):
        name, draws_scores = "drawn", True

        def draws(self, images, tasks):
            noise = torch.tensor([0.0, 1.0, 3.0])[:, None, None]
            return [noise * self.logits(images.pixels(), task) for task in tasks]

    method, options = Drawn(), EvaluationOptions(novelty=("variance", "energy"), batch_size=3)
    check_novelty(method, options, 3)
    before, tally = (novelty_tally(method, TASKS, learnt, options) for learnt in (0, 2))
    for learnt, one in ((0, before), (2, tally)):
        measure_spaces(method, TASKS, learnt, options, novelty=one)
    assert list(before.found()) == ["energy"]  # nothing is drawn before anything has been learnt
    scores = [torch.cat(method.draws(ImageBatch(task.test.images.float() / 255), TASKS[:2]), dim=2) for task in TASKS]
    for kind, (found,) in tally.found().items():
        assert found == pytest.approx(novelty_detection(torch.cat(scores[:2], dim=1), scores[2], kind))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="variance is that over draws of the scores, and linear has one score"):
        check_novelty(Linear(), EvaluationOptions(novelty=("variance",)), 3)
    with pytest.raises(ValueError, match="expected at least two tasks, so that one is novel, got 1"):
        check_novelty(Linear(), EvaluationOptions(novelty=("energy",)), 1)
    check_novelty(Linear(), EvaluationOptions(), 1)
    for wrong in (("doubt",), ("energy", "energy")):
        with pytest.raises(
            ValueError, match="novelty: expected different ones of confidence, energy, entropy, variance"
        ):
            EvaluationOptions(novelty=wrong)
    with pytest.raises(NotImplementedError, match="Linear does not draw its scores"):
        Linear().feature_draws(torch.zeros(1, 2), TASKS)


def test_the_table_has_the_mean_over_tasks_and_the_spread_over_seeds(write_result):
    def measured(*values: float):
        return [{"auroc": value, "aupr": value + 1, "fpr95": 100 - value} for value in values]

    def runs(method: str, **kinds):
        return [
            write_result(f"{method}{seed}", method=method, seed=seed, novelty={k: v(seed) for k, v in kinds.items()})
            for seed in range(2)
        ]

    def energy(seed):
        return {"zero_shot": measured(50.0, 60.0), "after_task": measured(60.0 + seed, 70.0 + seed)}

    def variance(seed):
        return {"zero_shot": [], "after_task": measured(80.0, 90.0)}

    folders = runs("finetune", energy=energy) + runs("clap4clip", energy=energy, variance=variance)
    folders.append(write_result("ewc", method="ewc"))  # was not asked
    (board,), _ = arrange([read_result(folder / "result.json") for folder in folders])
    table = novelty_table(board)
    assert table.rows == [
        ["zero-shot", "energy", "", "55.0", "56.0", "45.0"],
        ["finetune", "energy", "2", "65.5 ± 0.7", "66.5 ± 0.7", "34.5 ± 0.7"],
        ["clap4clip", "energy", "2", "65.5 ± 0.7", "66.5 ± 0.7", "34.5 ± 0.7"],
        ["clap4clip", "variance", "2", "85.0 ± 0.0", "86.0 ± 0.0", "15.0 ± 0.0"],
    ]
    assert table.breaks == [3]
    (plain,), _ = arrange([read_result(folders[-1] / "result.json")])
    assert novelty_table(plain) is None


@pytest.mark.parametrize("damaged", [3, {"energy": 4}, {"energy": {"after_task": [], "zero_shot": [{"auroc": "x"}]}}])
def test_a_damaged_file_is_named(damaged, write_result):
    folder = write_result("run", novelty=damaged)
    with pytest.raises(ResultError, match="novelty is not what `clk run` writes"):
        read_result(folder / "result.json")

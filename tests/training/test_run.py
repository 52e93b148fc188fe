"""A run over a scenario: rows, results, resuming, refusing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fakes import ClosedFormMethod, ReferenceMethod, TinyConfig, TinyMethod, tiny_scenario

from cl_methods.evaluation import mtil_metrics
from cl_methods.evaluation.accuracy import EvaluationOptions
from cl_methods.training.checkpoints import CheckpointOptions, RunDirectory, RunDirectoryError, TrainingProgress
from cl_methods.training.progress import RunProgress

CONTRACT = {
    "method", "scenario", "seed", "tasks", "zero_shot", "accuracy", "transfer", "average", "last", "forgetting",
    "train", "environment", "config",
}  # fmt: skip


def without_times(result: dict) -> dict:
    result = copy.deepcopy(result)
    del result["evaluation_seconds"]
    for name in ("seconds", "samples_per_second", "peak_memory_bytes", "seconds_per_task"):
        del result["train"][name]
    return result


def test_result_has_what_the_contract_asks_for(tiny_run, tmp_path):
    result = tiny_run(tmp_path / "run", method=ReferenceMethod)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.keys() >= CONTRACT
    assert result["tasks"] == ["task0", "task1", "task2"]
    assert len(result["zero_shot"]) == 3
    assert [len(row) for row in result["accuracy"]] == [3, 3, 3]
    assert result["transfer"] == mtil_metrics(result["accuracy"])["transfer"]
    assert result["train"]["samples"] == 3 * 7 * 8
    assert result["train"]["trainable_parameters"] == 48 * 3 + 3
    assert result["config"]["method"]["name"] == "tiny_reference"
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["task00", "task01", "task02"]


def test_training_helps(tiny_run, tmp_path):
    settings = TinyConfig(iterations=60, lr=0.05)
    result = tiny_run(tmp_path / "run", settings=settings, scenario=tiny_scenario(train=60))
    assert result["accuracy"][-1][-1] > result["zero_shot"][-1] + 20


def test_same_seed_same_result_whatever_the_workers(tiny_run, tmp_path):
    first = tiny_run(tmp_path / "a", method=ReferenceMethod)
    second = tiny_run(tmp_path / "b", method=ReferenceMethod)
    third = tiny_run(tmp_path / "c", method=ReferenceMethod, workers=2)
    assert without_times(first) == without_times(second)
    assert first["accuracy"] == third["accuracy"]
    states = [RunDirectory(tmp_path / name).found()[-1].method_state() for name in "abc"]
    other = tiny_run(tmp_path / "d", method=ReferenceMethod, seed=1)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert other["seed"] == 1
    different = RunDirectory(tmp_path / "d").found()[-1].method_state()
    assert not torch.equal(states[0]["weight"], different["weight"])


class StopAt(RunProgress):
    """Ends the process' run at the n-th event, in the middle of whatever it is doing."""

    def __init__(self, event: int) -> None:
        super().__init__()
        self.left = event

    def _tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError

    def step(self, report) -> None:
        super().step(report)
        self._tick()

    def evaluated(self, task, accuracy) -> None:
        super().evaluated(task, accuracy)
        self._tick()

    def row_finished(self, after, row) -> None:
        super().row_finished(after, row)
        self._tick()


def test_novelty_is_in_the_result_and_survives_a_restart(tiny_run, tmp_path):
    options = {"evaluation": EvaluationOptions(novelty=("energy", "entropy"))}
    whole = without_times(tiny_run(tmp_path / "whole", **options))
    assert list(whole["novelty"]) == ["energy", "entropy"]
    for found in whole["novelty"].values():
        assert [len(found[when]) for when in ("zero_shot", "after_task")] == [2, 2]
        assert all(0 <= value <= 100 for rows in found.values() for row in rows for value in row.values())
    with pytest.raises(InterruptedError):
        tiny_run(tmp_path / "stopped", progress=StopAt(17), **options)
    assert without_times(tiny_run(tmp_path / "stopped", resume=True, **options)) == whole
    assert "novelty" not in tiny_run(tmp_path / "plain")


@pytest.mark.parametrize("every", [0, 2])
def test_stopped_anywhere_and_resumed_gives_the_same_result(tiny_run, tmp_path, every):
    options = {"method": ReferenceMethod, "checkpoint": CheckpointOptions(every=every, keep="last" if every else "all")}
    whole = without_times(tiny_run(tmp_path / "whole", **options))
    for event in (1, 5, 8, 12, 17, 25, 34):
        output = tmp_path / f"event{event}"
        with pytest.raises(InterruptedError):
            tiny_run(output, progress=StopAt(event), **options)
        assert not (output / "result.json").exists()
        with pytest.raises(InterruptedError):
            tiny_run(output, progress=StopAt(2), resume=True, **options)
        resumed = tiny_run(output, resume=True, **options)
        assert without_times(resumed) == whole, f"stopped at event {event}"


def test_a_method_in_closed_form_sees_every_image_once_and_can_be_resumed_anywhere(tiny_run, tmp_path):
    options = {"method": ClosedFormMethod, "checkpoint": CheckpointOptions(every=1)}
    whole = without_times(tiny_run(tmp_path / "whole", **options))
    assert whole["train"]["samples"] == 3 * 20
    assert whole["train"]["trainable_parameters"] == 0
    assert whole["accuracy"][-1][-1] > whole["zero_shot"][-1]
    for event in (1, 5, 6, 7, 9, 13, 20):
        output = tmp_path / f"event{event}"
        with pytest.raises(InterruptedError):
            tiny_run(output, progress=StopAt(event), **options)
        resumed = without_times(tiny_run(output, resume=True, **options))
        assert resumed == whole, f"stopped at event {event}"


def test_a_resumed_method_is_told_which_tasks_it_has_learnt(tiny_run, tmp_path):
    recalled = []

    class Recalling(TinyMethod):
        name = "recalling"

        def recall(self, tasks):
            recalled.append([task.name for task in tasks])

    for event in (3, 12, 28):  # before training, after the first task, in the third
        with pytest.raises(InterruptedError):
            tiny_run(tmp_path / f"event{event}", method=Recalling, progress=StopAt(event))
        tiny_run(tmp_path / f"event{event}", method=Recalling, resume=True)
    assert recalled == [["task0"], ["task0", "task1"]]


def test_resuming_refuses_other_settings_and_other_data(tiny_run, tmp_path):
    with pytest.raises(InterruptedError):
        tiny_run(tmp_path / "run", progress=StopAt(5))
    with pytest.raises(RunDirectoryError, match=r"method\.lr was 0\.01, now 0\.02; seed was 0, now 7"):
        tiny_run(tmp_path / "run", resume=True, settings=TinyConfig(lr=0.02), seed=7)
    with pytest.raises(RunDirectoryError, match=r"data of scenario tiny has changed .*fingerprint"):
        tiny_run(tmp_path / "run", resume=True, scenario=tiny_scenario(train=21))
    tiny_run(tmp_path / "run", resume=True, workers=1)


def test_a_directory_with_content_is_not_overwritten_silently(tiny_run, tmp_path):
    output = tmp_path / "run"
    first = tiny_run(output)
    before = (output / "result.json").read_bytes()
    with pytest.raises(
        RunDirectoryError, match=r"already holds a run; continue it with --resume, replace it with --over"
    ):
        tiny_run(output)
    assert (output / "result.json").read_bytes() == before
    assert tiny_run(output, resume=True) == first
    (output / "notes.txt").write_text("mine")
    tiny_run(output, overwrite=True, seed=3)
    assert json.loads((output / "result.json").read_text())["seed"] == 3
    assert (output / "notes.txt").read_text() == "mine"


def test_a_directory_of_something_else_is_never_touched(tiny_run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunDirectoryError, match=r"is not empty and holds no earlier run \(found thesis\.tex\)"):
            tiny_run(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resuming_nothing_starts_from_the_beginning(tiny_run, tmp_path):
    assert without_times(tiny_run(tmp_path / "a", resume=True)) == without_times(tiny_run(tmp_path / "b"))


def test_zero_shot_and_joint_repeat_their_row(tiny_run, tmp_path):
    class Frozen(TinyMethod):
        name, trains = "frozen", False

    class Joint(TinyMethod):
        name, joint = "joint", True

    frozen = tiny_run(tmp_path / "frozen", method=Frozen)
    assert frozen["accuracy"] == [frozen["zero_shot"]] * 3
    assert frozen["train"]["trainable_parameters"] == 0
    assert frozen["forgetting"] == 0
    joint = tiny_run(tmp_path / "joint", method=Joint)
    assert joint["accuracy"] == [joint["accuracy"][0]] * 3
    assert joint["accuracy"][0] != joint["zero_shot"]
    assert joint["continual"] is False
    assert joint["transfer"] is joint["forgetting"] is None


def test_limits_cut_a_run_short(tiny_run, tmp_path):
    result = tiny_run(tmp_path / "run", limit_tasks=2, limit_iterations=1)
    assert result["tasks"] == ["task0", "task1"]
    assert result["train"]["samples"] == 2 * 2 * 8


def test_half_written_checkpoints_are_ignored_and_removed(tiny_run, tmp_path):
    whole = without_times(tiny_run(tmp_path / "whole"))
    with pytest.raises(InterruptedError):
        tiny_run(tmp_path / "run", progress=StopAt(14))
    debris = tmp_path / "run" / "checkpoints" / ".incomplete-x"
    debris.mkdir()
    (debris / "model.safetensors").write_bytes(b"half")
    assert without_times(tiny_run(tmp_path / "run", resume=True)) == whole
    assert not debris.exists()


def test_a_checkpoint_survives_a_crash_while_its_successor_is_written(tiny_run, tmp_path, monkeypatch):
    with pytest.raises(InterruptedError):
        tiny_run(tmp_path / "run", progress=StopAt(15))
    directory = RunDirectory(tmp_path / "run")
    before = directory.found()
    assert before

    def crash(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        directory.save(1, None, before[-1].method_state(), None, before[-1].training_state()[1])
    assert directory.found() == before
    assert before[-1].method_state()


def test_a_run_of_a_later_version_is_left_as_it_is(tiny_run, tmp_path):
    with pytest.raises(InterruptedError):
        tiny_run(tmp_path / "run", progress=StopAt(15))
    path = tmp_path / "run" / "run.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format": description["format"] + 1}))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(RunDirectoryError, match=r"files of format 2, written by cl_kernels .*reads formats up to 1"):
        tiny_run(tmp_path / "run", resume=True)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    del description["format"]  # as before there were formats
    path.write_text(json.dumps(description))
    tiny_run(tmp_path / "run", resume=True)


def test_aliased_and_strided_tensors_are_stored(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    state = {"a": shared, "b": shared, "t": shared.t(), "row": shared[1], "flag": torch.tensor(True)}
    directory = RunDirectory(tmp_path)
    loaded = directory.save(0, None, state, None, TrainingProgress()).method_state()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)

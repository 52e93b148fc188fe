"""Measuring the checkpoints of a run again: in other label spaces and scopes, on other images or other data; nothing is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_methods.evaluation.accuracy import feature_store, measure_spaces, row_reader
from cl_methods.evaluation.options import LabelSpace
from cl_methods.methods import Method
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import build_method, decide_batch, select_scenario
from cl_methods.training.checkpoints import RunDirectory, TrainingProgress
from cl_methods.training.config import RunConfig, differences
from cl_methods.training.environment import choose_device
from cl_methods.training.evaluation_checks import check_settings, check_weights, is_own_data, own_rows
from cl_methods.training.export.learnt import ExportError, read_learnt
from cl_methods.training.failures import hear_no_more_of, worker_died
from cl_methods.training.identity import check_same_everywhere, describe_run
from cl_methods.training.memory.levers import use_levers
from cl_methods.training.progress import RunProgress
from cl_methods.training.result import run_result
from cl_methods.training.rows import Rows
from cl_methods.training.starting_point import StartingPoint
from cl_methods.worker_death import is_worker_death


@dataclass(frozen=True)
class Evaluated:
    """What was measured of a run's checkpoints.

    Attributes:
        names: of the rows, such as "zero-shot" and "after DTD".
        scenario: on which it was measured.
        rows: what was found in each label space, the first row as zero-shot one.
        description: settings, fingerprints, environment; ``evaluated_from`` says which run and what differs from it.
        result: content of ``result.json``, as of a run; None unless the run is complete and all its rows and tasks were measured.
        agreement: a sentence about how the rows compare with the run's own; None where it has none of the same.
    """

    names: list[str]
    scenario: Scenario
    rows: dict[LabelSpace, Rows]
    description: dict[str, Any]
    result: dict[str, Any] | None
    agreement: str | None

    def accuracies(self, space: LabelSpace) -> list[list[float]]:
        """Rows of accuracies in percent, as many as names."""
        return [self.rows[space].zero_shot or [], *self.rows[space].accuracy]

    def as_dict(self) -> dict[str, Any]:
        """Content of ``evaluation.json``."""
        spaces = {
            space: {"accuracy": self.accuracies(space), "calibration_error": rows.calibration_error}
            for space, rows in self.rows.items()
        }
        tasks = [task.name for task in self.scenario.tasks]
        return {
            **self.description,
            "tasks": tasks,
            "data": self.scenario.notes,
            "rows": self.names,
            "label_spaces": spaces,
        }


@dataclass
class Evaluating:
    """A run whose checkpoints are measured under a configuration that differs from its own in data, evaluation or scoring.

    Attributes:
        config: what is measured and how.
        run: directory of the run.
        description: its ``run.json``.
        checkpoints: numbers of learnt tasks after which it is measured, 0 for before the first; None: all that are there.
        progress: what to report to.
    """

    config: RunConfig
    run: Path
    description: dict[str, Any]
    checkpoints: Sequence[int] | None = None
    progress: RunProgress = field(default_factory=RunProgress)

    def execute(self) -> Evaluated:
        """Measure; an image is decoded once where the cache holds it, and encoded once for each state of its encoder.

        Raises:
            ExportError: a checkpoint is missing, damaged, or was learnt on other weights.
            DataError: data is missing or damaged.
            ValueError: what was asked for would not be a measurement of this run, or not a fair one.
            WorkerDiedError: a process that reads images was killed.
        """
        config, learnt = self.config, list(self.description["tasks"])
        check_settings(self.run, self.description, config)
        chosen = self._chosen()
        scenario = select_scenario(config)
        own = is_own_data(self.run, self.description, config, scenario)
        if not own and "seen" in config.evaluation.label_spaces:
            raise ValueError(
                f"label_space: seen is of the tasks that the run in {self.run} learns one after the other, and other tasks were "
                "given; expected task or all"
            )
        device = choose_device(config.device)
        method = build_method(config, scenario, device)
        self.config = config = decide_batch(config, scenario, method, self.progress.note)
        use_levers(method, config.levers)
        check_weights(self.run, self.description, method)
        description = describe_run(config, scenario, method, device)
        description |= {"started_from": self.description.get("started_from"), "evaluated_from": self._source(chosen)}
        check_same_everywhere(description)
        names = [self._name(number, joint=method.joint) for number in chosen]
        try:
            rows = self._measure(method, scenario, chosen, names, own=own)
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
            hear_no_more_of(error)
            raise worker_died(error, "Nothing has been changed: give the command again") from error
        whole = own and len(scenario.tasks) == len(learnt)
        return Evaluated(
            names,
            scenario,
            rows,
            description,
            self._result(scenario, method, rows, description, len(chosen)) if whole else None,
            self._agreement(rows, chosen, description["evaluated_from"]["changed"]) if whole else None,
        )

    def _measure(
        self, method: Method, scenario: Scenario, chosen: Sequence[int], names: Sequence[str], *, own: bool
    ) -> dict[LabelSpace, Rows]:
        """One row after the other, from one reader and one store of frozen features."""
        tasks, options, started = scenario.tasks, self.config.evaluation, self.description.get("started_from")
        found = {space: Rows() for space in options.label_spaces}
        method.expect(tasks)
        self.progress.run_started(method.name, self.config.scenario, len(tasks), [])
        self.progress.pace.rows_left = len(chosen)
        store = feature_store(tasks, options, self.progress.note)
        with closing(row_reader(method, tasks, options, self.config.workers)) as reader:
            for number, name in zip(chosen, names, strict=True):
                if number:
                    state = StartingPoint(self.run, *read_learnt(self.run, number, option="run"))
                    state.put_into(method, trains=False)
                    if own:
                        method.recall(tasks[:number])
                elif started:
                    StartingPoint.read(Path(started["source"])).put_into(method, trains=False)
                self.progress.evaluation_started(name, len(tasks))
                known = len(tasks) if method.joint and number else min(number, len(tasks))
                measured = measure_spaces(
                    method,
                    tasks,
                    known if own else 0,
                    options,
                    on_task=lambda index, value: self.progress.evaluated(tasks[index].name, value),
                    store=store,
                    reader=reader,
                )
                for space, rows in found.items():
                    rows.add(measured[space])
                self.progress.row_finished(name, [entry.accuracy for entry in measured[options.label_spaces[0]]])
        return found

    def _chosen(self) -> list[int]:
        finished = [one.task + 1 for one in RunDirectory(self.run).found() if one.step is None]
        if not finished:
            hint = "" if find_method(self.config.method).trains else "; what learns nothing is measured by `clk run`"
            raise ExportError(f"run: {self.run} has no checkpoint of a finished task{hint}")
        if self.checkpoints is None:
            return [0, *finished]
        wrong = sorted(set(self.checkpoints) - {0, *finished})
        if wrong:
            there = f"0 (before learning) and {', '.join(map(str, finished))}"
            raise ExportError(f"checkpoints: {self.run} has {there}; got {', '.join(map(str, wrong))}")
        return sorted(set(self.checkpoints))

    def _name(self, number: int, *, joint: bool) -> str:
        if number == 0:
            return "at the start" if self.description.get("started_from") else "zero-shot"
        return "all tasks at once" if joint else f"after {self.description['tasks'][number - 1]}"

    def _source(self, chosen: Sequence[int]) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "scenario_fingerprint": self.description["scenario_fingerprint"],
            "checkpoints": list(chosen),
            "changed": differences(self.description["config"], self.config.as_dict()),
        }

    def _agreement(self, rows: dict[LabelSpace, Rows], chosen: Sequence[int], changed: Sequence[str]) -> str | None:
        if any(not one.startswith("evaluation.label_space ") for one in changed):
            return None
        gaps: list[float] = []
        for space, found in rows.items():
            known = own_rows(self.run, self.description, space)
            for number, row in zip(chosen, [found.zero_shot or [], *found.accuracy], strict=True):
                gaps += [abs(one - other) for one, other in zip(known.get(number, row), row, strict=True)] * (
                    number in known
                )
        if not gaps:
            return None
        how = f"within {max(gaps):.3g} points of" if max(gaps) else "equal to"
        return f"{len(gaps)} of these accuracies were measured in {self.run} before, and are {how} those"

    def _result(
        self,
        scenario: Scenario,
        method: Method,
        rows: dict[LabelSpace, Rows],
        description: dict[str, Any],
        measured: int,
    ) -> dict[str, Any] | None:
        """As the run would have written it; None where it is not complete, or not all of its rows were asked for."""
        earlier = RunDirectory(self.run).read_json("result.json")
        if earlier is None or measured != (2 if method.joint else len(scenario.tasks) + 1):
            return None
        first, *further = rows
        together = Rows(**{**vars(rows[first]), "further": {space: rows[space] for space in further}})
        result = run_result(
            self.config,
            scenario,
            method=method.name,
            joint=method.joint,
            rows=together,
            training=TrainingProgress(),
            peaks=[0],
            description=description,
        )
        return {**result, "train": earlier["train"], "evaluated_from": description["evaluated_from"]}

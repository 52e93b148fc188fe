"""A run: one method over a whole scenario, evaluated on every task after every task."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from cl_kernels.profile import peak_memory_bytes, start_peak_memory
from cl_methods import ranks
from cl_methods.backbone import load_backbone
from cl_methods.evaluation.accuracy import feature_store, measure_spaces
from cl_methods.methods import Method
from cl_methods.methods.find import find_method
from cl_methods.scenarios import load as load_scenario
from cl_methods.scenarios.base import Scenario
from cl_methods.seeding import derive_seed, seed_everything
from cl_methods.training.checkpoints import DamagedError, RunDirectory, RunDirectoryError, TrainingProgress
from cl_methods.training.config import RunConfig, differences
from cl_methods.training.environment import choose_device, describe_environment
from cl_methods.training.failures import explain, require_finite
from cl_methods.training.loop import StepReport
from cl_methods.training.progress import RunProgress
from cl_methods.training.restoring import Restored, restore
from cl_methods.training.result import run_result
from cl_methods.training.rows import Rows
from cl_methods.training.task import Continuation, TaskTraining, use_micro_batches

if TYPE_CHECKING:
    from cl_methods.training.memory import MemoryPlan


class StoppedError(RuntimeError):
    """The run was asked to stop; it has written a checkpoint and can be resumed."""


def run(
    config: RunConfig,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Train and evaluate a whole task sequence, or finish one that was interrupted.

    The zero-shot row first; then for each task: train, checkpoint, evaluate all tasks, write the row. On a CPU a run that
    was killed and resumed gives the same accuracies to the bit.

    Args:
        config: everything that decides the result.
        output: directory of the run; see :class:`~cl_methods.training.checkpoints.RunDirectory`.
        resume: continue an earlier run in ``output``; one that is complete is returned as it is.
        overwrite: replace an earlier run in ``output``.
        progress: what to report to; silent when None.

    Returns:
        The content of ``result.json``.

    Raises:
        RunDirectoryError: ``output`` has content that may not be touched, or holds a run of other settings or other data.
        DataError: the scenario's data is missing or damaged.
        ValueError: a setting is wrong.
        NonFiniteLossError: training diverged; ``diverged.json`` says where.
        WorkerDiedError: a process that reads images was killed.
        WriteError: something could not be written; what was written before is intact.
        StoppedError: :meth:`Run.stop` was called.
    """
    with progress or RunProgress() as reporter:
        return Run(config, output, resume=resume, overwrite=overwrite, progress=reporter).execute()


class Run:
    """The state of a run; see :func:`run`. Creating it loads data and model and prepares the directory."""

    def __init__(
        self, config: RunConfig, output: Path, *, resume: bool, overwrite: bool, progress: RunProgress
    ) -> None:
        self.config, self.reporter = config, progress
        self.device = choose_device(config.device)
        start_peak_memory(self.device)
        self.scenario = scenario = select_scenario(config)
        self.memory_plan = self._plan_memory() if config.memory_budget is not None else None
        self.method = build_method(config, scenario, self.device)
        if self.memory_plan is not None:
            use_micro_batches(self.method, self.memory_plan.micro_batches)
        self.directory = RunDirectory(output)
        origin = getattr(self.method.backbone, "origin", None)
        self.description: dict[str, Any] = {
            "config": config.as_dict(),
            "scenario_fingerprint": scenario.fingerprint(),
            "tasks": [task.name for task in scenario.tasks],
            "weights": origin.as_dict() if origin is not None else None,
            "environment": describe_environment(self.device),
            "command": shlex.join(sys.argv),
        }
        if self.memory_plan is not None:
            self.description["memory_plan"] = self.memory_plan.as_dict()
        self._stop = False
        if self.directory.prepare(resume=resume, overwrite=overwrite):
            self._check_same(self.directory.read_json("run.json"))
        else:
            self.directory.write_json("run.json", self.description)
        if origin is not None and origin.source != "embedded":
            self.reporter.note(origin.sentence())
        self.rows = Rows()
        self.features = feature_store(scenario.tasks, config.evaluation, progress.note)
        self.method.expect(scenario.tasks)
        self.training = TrainingProgress()

    def _plan_memory(self) -> MemoryPlan | None:
        from cl_methods.training.memory import give_back_freed_memory, plan_run  # which take a second to load

        if self.device.type == "cpu":
            give_back_freed_memory()
        with ranks.alone():  # a rehearsal of one process's step
            plan = plan_run(self.config, self.scenario, self.device)
        for line in (
            plan.lines() if plan is not None else ["memory_budget: no plan, the method takes no optimiser steps"]
        ):
            self.reporter.note(line)
        return plan

    def stop(self) -> None:
        """Ask the run to write a checkpoint after the present optimiser step and raise :class:`StoppedError`.

        During an evaluation, before which everything has been written, it ends after the present task's images.
        """
        self._stop = True

    def execute(self) -> dict[str, Any]:
        """Do what is left to do and write ``result.json``."""
        if ranks.first():
            (self.directory.path / "diverged.json").unlink(missing_ok=True)
        try:
            return self._execute()
        except RuntimeError as error:
            with ranks.alone():  # the others may be elsewhere
                explained = explain(error, self.directory)
            if explained is error:
                raise
            raise explained from error

    def _execute(self) -> dict[str, Any]:
        try:
            finished = self.directory.read_json("result.json")
        except DamagedError as error:
            finished = None
            self.reporter.note(f"{error}; it is made again")
        if finished is not None:
            self.reporter.note(f"{self.directory.path} is complete; nothing left to do")
            return finished
        tasks, trains = self.scenario.tasks, self.method.trains
        sessions = ([0] if self.method.joint else list(range(len(tasks)))) if trains else []
        steps = [self.method.steps(tasks[index]) for index in sessions]
        self.reporter.run_started(
            self.method.name,
            self.config.scenario,
            len(sessions) or len(tasks),
            steps,
            closed_form=self.method.closed_form,
        )
        restored = self._restore(steps)
        latest = restored.checkpoint
        if self.rows.zero_shot is None:
            self._evaluate(0)
        for index in range(rows_after_learning(self.config, self.method, len(tasks)) if not trains else 0):
            if len(self.rows.accuracy) <= index:
                self._evaluate(index + 1)
        for index in sessions:
            self._end_if_stopped(f"before task {tasks[index].name}")
            done = latest is not None and (index < latest.task or (index == latest.task and latest.step is None))
            if not done:
                self._train(index, len(sessions), steps[index], restored if latest and latest.task == index else None)
            if len(self.rows.accuracy) <= index:
                self._evaluate(index + 1)
        result = run_result(
            self.config,
            self.scenario,
            method=self.method.name,
            joint=self.method.joint,
            rows=self.rows,
            training=self.training,
            peak_memory=max(ranks.gather_values(peak_memory_bytes(self.device))),
            description=self.description,
        )
        if self.memory_plan is not None:
            self.reporter.note(self.memory_plan.measured(result["train"]["peak_memory_bytes"]))
        self.directory.write_json("result.json", result)
        return result

    def _check_same(self, before: dict[str, Any]) -> None:
        """Refuse to resume a run of other settings or other data."""
        changed = differences(before["config"], self.description["config"])
        if changed:
            raise RunDirectoryError(
                f"resume: the run in {self.directory.path} has other settings: {'; '.join(changed)}. "
                "Give the same settings again, or choose another directory"
            )
        if before["scenario_fingerprint"] != self.description["scenario_fingerprint"]:
            raise RunDirectoryError(
                f"resume: the data of scenario {self.config.scenario} has changed since the run in "
                f"{self.directory.path} began (fingerprint {before['scenario_fingerprint'][:12]}, "
                f"now {self.description['scenario_fingerprint'][:12]}). Restore the data, or start a new run"
            )
        was, now = (entry.get("weights") or {} for entry in (before, self.description))
        if was.get("fingerprint") and was["fingerprint"] != now.get("fingerprint"):
            raise RunDirectoryError(
                f"resume: the weights of {self.config.model} have changed since the run in {self.directory.path} began "
                f"(fingerprint {was['fingerprint'][:12]} of {was['source']}, now {str(now.get('fingerprint'))[:12]}). "
                "Restore the file, or start a new run"
            )
        old, new = before["environment"], self.description["environment"]
        moved = [f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
        if moved:
            self.reporter.note(
                f"resuming in another environment; results may differ in the last bits: {'; '.join(moved)}"
            )

    def _restore(self, steps: list[int]) -> Restored:
        """Load the newest checkpoint that is intact, or for one inside a task what came before that task."""
        restored = ranks.from_first(lambda: restore(self.directory, len(self.scenario.tasks)))
        for sentence in restored.sentences:
            self.reporter.note(sentence)
        self.rows, self.training, latest = restored.rows, restored.training, restored.checkpoint
        if latest is None:
            return restored
        if restored.before is not None:
            self.method.load_state_dict(restored.before)
            self.method.recall(self.scenario.tasks[: latest.task + (latest.step is None)])
        rows = len(self.rows.accuracy) + (self.rows.zero_shot is not None)
        self.reporter.pace.skip(sum(steps[: latest.task + (latest.step is None)]) + (latest.step or 0), rows)
        where = "after" if latest.step is None else f"at step {latest.step} of"
        self.reporter.note(f"resuming {where} task {self.scenario.tasks[latest.task].name}")
        return restored

    def _train(self, index: int, sessions: int, steps: int, restored: Restored | None) -> None:
        method, progress = self.method, self.training
        watched: list[tuple[str, torch.Tensor]] = []
        watched_of: torch.optim.Optimizer | None = None
        name = "all tasks together" if method.joint else self.scenario.tasks[index].name
        continuation = None
        if restored is not None and restored.checkpoint is not None and restored.method_state is not None:
            done_before = restored.checkpoint.step or 0
            continuation = Continuation(done_before, restored.method_state, restored.optimizer_state or {})
        else:
            progress.seconds.append(0.0)
        clock = time.perf_counter()

        def count_time() -> None:
            nonlocal clock
            now = time.perf_counter()
            progress.seconds[index] += now - clock
            clock = now

        def on_start() -> None:
            if len(progress.trainable_parameters) == index:
                progress.trainable_parameters.append(sum(parameter.numel() for _, parameter in method.trainable()))
            _check_frozen_images(method)
            done = continuation.start_step if continuation else 0
            self.reporter.task_started(name, index + 1, sessions, steps, done)

        def on_step(report: StepReport) -> None:
            nonlocal watched, watched_of
            if report.optimizer is not watched_of:  # a stage begins
                watched, watched_of = list(method.trainable()), report.optimizer
            progress.samples += report.samples
            self.reporter.step(report)
            done, every = report.step + 1, self.config.checkpoint.every
            stop = ranks.anyone(self._stop)
            if stop or (every and done % every == 0 and done < steps):
                report.log.check()  # never store weights that a loss has already shown to be broken
                require_finite(watched, name, report.step)
                count_time()
                self._save(index, done, report.optimizer.state_dict() if report.optimizer is not None else None)
            if stop:
                self._end(f"after step {done} of task {name}")

        training = TaskTraining(
            method,
            index,
            self.scenario.tasks,
            seed=self.config.seed,
            workers=self.config.workers,
            continuation=continuation,
            on_start=on_start,
            on_step=on_step,
        )
        training.execute()
        require_finite(method.state_dict().items() if method.closed_form else watched, name, steps - 1)
        count_time()
        self._save(index, None, None)

    def _save(self, index: int, step: int | None, optimizer_state: dict[str, Any] | None) -> None:
        state, keep = self.method.state_dict(), self.config.checkpoint.keep
        rows = asdict(self.rows)
        self.directory.save(index, step, state, optimizer_state, self.training, keep=keep, rows=rows)

    def _end_if_stopped(self, where: str) -> None:
        """End here if somebody asked for it, in any of the processes."""
        if ranks.anyone(self._stop):
            self._end(where)

    def _end(self, where: str) -> NoReturn:
        raise StoppedError(f"stopped {where}; continue with --resume")

    def _evaluate(self, learnt: int) -> None:
        """Measure one row of the matrix and write it down; 0 tasks learnt is the zero-shot row."""
        tasks = self.scenario.tasks
        after = "zero-shot" if learnt == 0 else "joint" if self.method.joint else f"after {tasks[learnt - 1].name}"
        if self.method.joint and learnt:
            learnt = len(tasks)
        self.reporter.evaluation_started(after, len(tasks))
        clock = time.perf_counter()

        def evaluated(index: int, value: float) -> None:
            self.reporter.evaluated(tasks[index].name, value)
            if index + 1 < len(tasks):  # the row is complete after the last
                self._end_if_stopped(f"in the evaluation {after}")

        measured = measure_spaces(
            self.method,
            tasks,
            learnt,
            self.config.evaluation,
            self.config.workers,
            on_task=evaluated,
            store=self.features,
        )
        self.rows.seconds.append(time.perf_counter() - clock)
        row, *further = measured
        finished = self.rows.add(measured[row])
        for space in further:
            self.rows.further.setdefault(space, Rows()).add(measured[space])
        self.directory.write_json("rows.json", asdict(self.rows))
        self.reporter.row_finished(after, finished)


def _check_frozen_images(method: Method) -> None:
    """Features of a tower that trains must not be taken for frozen ones."""
    visual = getattr(method.backbone.model, "visual", None)
    if method.frozen_images and visual is not None:
        tower = {id(value) for value in visual.parameters()}
        trained = [name for name, value in method.trainable() if id(value) in tower]
        if trained:
            raise ValueError(
                f"frozen_images: {method.name} says that evaluation images keep their features, but it trains {trained[0]}; "
                "leave frozen_images False"
            )


def rows_after_learning(config: RunConfig, method: Method | type[Method], tasks: int) -> int:
    """Rows of accuracies besides the zero-shot one.

    A method that learns nothing keeps that row, except in class-incremental runs, where more classes compete after every task.
    """
    if method.trains:
        return 1 if method.joint else tasks
    return tasks if config.scenario == "cil" and "seen" in config.evaluation.label_spaces else 0


def select_scenario(config: RunConfig) -> Scenario:
    """The configured scenario, cut to its first ``limit_tasks`` tasks.

    Raises:
        DataError: its data is missing or damaged.
    """
    scenario = load_scenario(config.scenario, config.data, order=config.order)
    if config.limit_tasks is None:
        return scenario
    return replace(scenario, tasks=scenario.tasks[: config.limit_tasks])


def build_method(config: RunConfig, scenario: Scenario, device: torch.device) -> Method:
    """The configured method over its backbone, built with seeded random numbers.

    Raises:
        ValueError: the method needs reference data and the scenario has none, or the model cannot be loaded.
    """
    seed_everything(derive_seed(config.seed, "build"))
    backbone = load_backbone(config.model, config.pretrained, device=device)
    return find_method(config.method)(backbone, config.effective_settings(), scenario.reference)

"""A run: one method over a whole scenario, evaluated on every task after every task."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cl_kernels.profile import peak_memory_bytes, start_peak_memory
from cl_methods import ranks
from cl_methods.components.compiled_blocks import check_compile, compile_blocks
from cl_methods.datasets.images import DataError
from cl_methods.evaluation.accuracy import feature_store, measure_spaces, row_reader
from cl_methods.evaluation.novelty import novelty_tally
from cl_methods.sharding import gathered, load_method_state
from cl_methods.training.building import (
    build_method,
    check_distributed,
    decide_batch,
    plan_run_memory,
    rows_after_learning,
    select_scenario,
    shard_backbone,
)
from cl_methods.training.checkpoints import DamagedError, RunDirectory, TrainingProgress
from cl_methods.training.checkpoints.restoring import Restored, restore
from cl_methods.training.config import RunConfig
from cl_methods.training.environment import choose_device
from cl_methods.training.failures import explain, hear_no_more_of
from cl_methods.training.identity import check_same_everywhere, check_same_run, describe_run, evaluation_batch_of
from cl_methods.training.learning import Learning
from cl_methods.training.memory.levers import use_levers
from cl_methods.training.progress import RunProgress
from cl_methods.training.result import run_result
from cl_methods.training.rows import Rows
from cl_methods.training.signals import StoppedError
from cl_methods.training.starting_point import StartingPoint, start_sentence
from cl_methods.training.task import backbones, use_micro_batches


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
        self.reporter = progress
        check_distributed(config)
        self.device = choose_device(config.device)
        check_compile(config.compile, self.device)
        self.directory = RunDirectory(output)
        self.directory.check(resume=resume, overwrite=overwrite)  # before models are loaded; again when it is taken
        start_peak_memory(self.device)
        start = None if config.weights is None else StartingPoint.read(config.weights)
        self.scenario = scenario = select_scenario(config)
        self.memory_plan = plan_run_memory(config, scenario, self.device, progress.note)
        self.method = build_method(config, scenario, self.device)
        earlier = evaluation_batch_of(self.directory) if resume else None
        self.config = config = decide_batch(
            config, scenario, self.method, progress.note, plan=self.memory_plan, earlier=earlier
        )
        if start is not None:
            start.put_into(self.method, trains=config.learns(self.method))
        self.learnt_before = 0 if start is None else len(start.learnt.tasks)
        use_levers(self.method, config.levers)
        if self.memory_plan is not None:
            use_micro_batches(self.method, self.memory_plan.micro_batches)
        if config.compile != "none":
            compile_blocks(backbones(self.method), config.compile)
        shard_backbone(config, self.method, progress.note)
        self.description = describe_run(config, scenario, self.method, self.device)
        self.description["started_from"] = start.as_dict() if start is not None else None
        check_same_everywhere(self.description)
        if self.memory_plan is not None:
            self.description["memory_plan"] = self.memory_plan.as_dict()
        self._stop = False
        self._open_directory(resume=resume, overwrite=overwrite)
        try:
            self._prepare(start)
        except BaseException:
            self.directory.release()
            raise

    def _prepare(self, start: StartingPoint | None) -> None:
        """What a run needs besides its method and its directory."""
        tasks, config, note = self.scenario.tasks, self.config, self.reporter.note
        origin = getattr(self.method.backbone, "origin", None)
        if origin is not None and origin.source != "embedded":
            note(origin.sentence())
        if start is not None:
            note(start_sentence(self.description["started_from"]))
        self.rows = Rows()
        self.features = feature_store(tasks, config.evaluation, note)
        self.reader = row_reader(self.method, tasks, config.evaluation, config.workers)
        self.method.expect(tasks)
        self.training = TrainingProgress()

    def _open_directory(self, *, resume: bool, overwrite: bool) -> None:
        earlier = self.directory.prepare(resume=resume, overwrite=overwrite)
        try:
            if earlier:
                before = self.directory.read_json("run.json")
                check_same_run(before, self.description, self.directory.path, self.reporter.note)
            else:
                self.directory.write_json("run.json", self.description)
        except BaseException:
            self.directory.release()
            raise

    def stop(self) -> None:
        """Ask the run to write a checkpoint after the present optimiser step and raise :class:`StoppedError`.

        During an evaluation, before which everything has been written, it ends after the present task's images.
        """
        self._stop = True

    def execute(self) -> dict[str, Any]:
        """Do what is left to do and write ``result.json``."""
        try:
            return self._execute()
        except (RuntimeError, MemoryError, DataError) as error:
            hear_no_more_of(error)
            with ranks.alone():  # the others may be elsewhere
                explained = explain(error, self.directory)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.directory.release()
            self.reader.close()

    def _execute(self) -> dict[str, Any]:
        try:
            finished = self.directory.read_json("result.json")
        except DamagedError as error:
            finished = None
            self.reporter.note(f"{error}; it is made again")
        if finished is not None:
            self.reporter.note(f"{self.directory.path} is complete; nothing left to do")
            return finished
        self.directory.forget("diverged.json")
        tasks, trains = self.scenario.tasks, self.config.learns(self.method)
        sessions = ([0] if self.method.joint else list(range(len(tasks)))) if trains else []
        steps = [self.method.steps(tasks[index]) for index in sessions]
        self.reporter.run_started(
            self.method.name,
            self.config.scenario,
            len(sessions) or len(tasks),
            steps,
            closed_form=self.method.closed_form and trains,
        )
        restored = self._restore(steps)
        latest = restored.checkpoint
        if self.rows.zero_shot is None:
            self._evaluate(0)
        learning = Learning(
            self.config,
            self.method,
            tasks,
            self.directory,
            self.reporter,
            self.rows,
            self.training,
            lambda: self._stop,
            self.learnt_before,
        )
        for index in range(rows_after_learning(self.config, self.method, len(tasks)) if not trains else 0):
            if len(self.rows.accuracy) <= index:
                self._evaluate(index + 1)
        for index in sessions:
            self._end_if_stopped(f"before task {tasks[index].name}")
            done = latest is not None and (index < latest.task or (index == latest.task and latest.step is None))
            if not done:
                learning.learn(
                    index, len(sessions), steps[index], restored if latest and latest.task == index else None
                )
            if len(self.rows.accuracy) <= index:
                self._evaluate(index + 1)
        result = run_result(
            self.config,
            self.scenario,
            method=self.method.name,
            joint=self.method.joint,
            rows=self.rows,
            training=self.training,
            peaks=ranks.gather_values(peak_memory_bytes(self.device)),
            description=self.description,
        )
        if self.memory_plan is not None:
            self.reporter.note(self.memory_plan.measured(result["train"]["memory"]["measured"]))
        self.directory.write_json("result.json", result)
        return result

    def _restore(self, steps: list[int]) -> Restored:
        """Load the newest checkpoint that is intact, or for one inside a task what came before that task."""
        restored = ranks.from_first(lambda: restore(self.directory, len(self.scenario.tasks)))
        for sentence in restored.sentences:
            self.reporter.note(sentence)
        self.rows, self.training, latest = restored.rows, restored.training, restored.checkpoint
        if latest is None:
            return restored
        if restored.before is not None:
            load_method_state(self.method, restored.before)
            self.method.recall(self.scenario.tasks[: latest.task + (latest.step is None)])
        rows = len(self.rows.accuracy) + (self.rows.zero_shot is not None)
        self.reporter.pace.skip(sum(steps[: latest.task + (latest.step is None)]) + (latest.step or 0), rows)
        where = "after" if latest.step is None else f"at step {latest.step} of"
        self.reporter.note(f"resuming {where} task {self.scenario.tasks[latest.task].name}")
        return restored

    def _end_if_stopped(self, where: str) -> None:
        """End here if somebody asked for it, in any of the processes."""
        if ranks.anyone(self._stop):
            raise StoppedError(f"stopped {where}; continue with --resume")

    def _evaluate(self, learnt: int) -> None:
        """Measure one row of the matrix and write it down; 0 tasks learnt is the zero-shot row."""
        tasks = self.scenario.tasks
        first = "zero-shot" if not self.learnt_before else "at the start"
        after = first if learnt == 0 else "joint" if self.method.joint else f"after {tasks[learnt - 1].name}"
        if self.method.joint and learnt:
            learnt = len(tasks)
        self.reporter.evaluation_started(after, len(tasks))
        clock = time.perf_counter()
        novelty = novelty_tally(self.method, tasks, learnt, self.config.evaluation)

        def evaluated(index: int, value: float) -> None:
            self.reporter.evaluated(tasks[index].name, value)
            if index + 1 < len(tasks):  # the row is complete after the last
                self._end_if_stopped(f"in the evaluation {after}")

        with gathered(self.method.backbone):  # each process has batches of its own
            measured = measure_spaces(
                self.method,
                tasks,
                learnt,
                self.config.evaluation,
                on_task=evaluated,
                store=self.features,
                reader=self.reader,
                novelty=novelty,
            )
        self.rows.seconds.append(time.perf_counter() - clock)
        row, *further = measured
        finished = self.rows.add(measured[row])
        if self.config.evaluation.novelty:
            self.rows.novelty.append({} if novelty is None else novelty.found())
        for space in further:
            self.rows.further.setdefault(space, Rows()).add(measured[space])
        self.directory.write_json("rows.json", asdict(self.rows))
        self.reporter.row_finished(after, finished)

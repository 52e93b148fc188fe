"""Progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cl_methods.text import printable
from cl_methods.training.loop import StepReport


class Pace:
    """Rates of a run whose tasks have ``steps`` optimiser steps (or batches), for samples per second and the time left.

    The time left counts optimiser steps at their mean duration and evaluations at theirs; both are unknown (None) until
    the first of them is done.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps_left, self.rows_left = sum(steps), 1 + len(steps)
        self.steps = self.samples = self.rows = 0
        self.step_seconds = self.row_seconds = 0.0

    def step(self, samples: int, seconds: float) -> None:
        """Count one optimiser step."""
        self.steps, self.samples, self.step_seconds = (
            self.steps + 1,
            self.samples + samples,
            self.step_seconds + seconds,
        )
        self.steps_left -= 1

    def row(self, seconds: float) -> None:
        """Count one evaluation of all tasks."""
        self.rows, self.row_seconds, self.rows_left = self.rows + 1, self.row_seconds + seconds, self.rows_left - 1

    def skip(self, steps: int, rows: int) -> None:
        """Take off what an earlier process has already done."""
        self.steps_left, self.rows_left = self.steps_left - steps, self.rows_left - rows

    @property
    def samples_per_second(self) -> float:
        """Images of tasks per second of training."""
        return self.samples / self.step_seconds if self.step_seconds else 0.0

    def seconds_left(self, steps: int | None = None) -> float | None:
        """Of the next ``steps`` optimiser steps, or of the whole run."""
        if self.steps_left and not self.steps:
            return None
        per_step = self.step_seconds / self.steps if self.steps else 0.0
        if steps is not None:
            return steps * per_step
        per_row = self.row_seconds / self.rows if self.rows else 0.0
        return self.steps_left * per_step + self.rows_left * per_row


class RunProgress(AbstractContextManager["RunProgress"]):
    """What a run reports to: the silent base, which only keeps the pace."""

    def __init__(self) -> None:
        self.pace = Pace([])
        self._clock = 0.0
        self._task, self._steps = "", 0
        self._started = [0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run_started(
        self, method: str, scenario: str, tasks: int, steps: Sequence[int], *, closed_form: bool = False
    ) -> None:
        """Of ``tasks`` tasks those with an entry in ``steps`` are learnt, in so many steps; none: only one evaluation."""
        self.pace = Pace(steps)
        self._started = list(accumulate(steps, initial=0))

    def task_started(self, name: str, number: int, tasks: int, steps: int, done: int) -> None:
        """Training of a task starts, after ``done`` of its ``steps`` steps."""
        self._task, self._steps, self._clock = name, steps, time.perf_counter()

    def step(self, report: StepReport) -> None:
        """One optimiser step is done."""
        now = time.perf_counter()
        self.pace.step(report.samples, now - self._clock)
        self._clock = now

    def evaluation_started(self, after: str, tasks: int) -> None:
        """All tasks are about to be evaluated, ``after`` something was learnt."""
        self._clock = time.perf_counter()

    def evaluated(self, task: str, accuracy: float) -> None:
        """One task has been evaluated."""

    def row_finished(self, after: str, row: list[float]) -> None:
        """All tasks have been evaluated."""
        self.pace.row(time.perf_counter() - self._clock)

    def note(self, text: str) -> None:
        """Something that a reader of the log should know."""

    def close(self) -> None:
        """The run ends, well or badly."""


class PlainProgress(RunProgress):
    """A line at the start and the end of things, and every few seconds in between.

    A log that cannot be written, because its disk is full or its reader gone, does not end the run; once it can be written again it
    says so.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0) -> None:
        super().__init__()
        self.stream, self.interval, self._printed = stream or sys.stdout, interval, 0.0
        self._lost = 0

    def run_started(
        self, method: str, scenario: str, tasks: int, steps: Sequence[int], *, closed_form: bool = False
    ) -> None:
        """See the base class."""
        super().run_started(method, scenario, tasks, steps, closed_form=closed_form)
        self.note(f"{method} on {scenario}: {tasks} tasks, {describe_steps(steps, closed_form)}")

    def task_started(self, name: str, number: int, tasks: int, steps: int, done: int) -> None:
        """See the base class."""
        super().task_started(name, number, tasks, steps, done)
        self._printed = 0.0
        self._label = f"task {number}/{tasks} {name}"

    def step(self, report: StepReport) -> None:
        """See the base class."""
        super().step(report)
        now, last = time.perf_counter(), report.step + 1 == self._steps
        if last or now - self._printed >= self.interval:
            self._printed = now
            left = format_seconds(self.pace.seconds_left())
            self.note(
                f"{self._label}: step {report.step + 1}/{self._steps}, {describe_terms(report, ', ')}"
                f"{self.pace.samples_per_second:.0f} samples/s, {left} left"
            )

    def row_finished(self, after: str, row: list[float]) -> None:
        """See the base class."""
        super().row_finished(after, row)
        self.note(f"{after}: " + " ".join(f"{value:.1f}" for value in row) + f" (mean {sum(row) / len(row):.1f})")

    def note(self, text: str) -> None:
        """See the base class."""
        lost = (
            f"({self._lost} lines before this one came late, or not at all: the log could not be written)\n"
            if self._lost
            else ""
        )
        try:
            print(f"{lost}{printable(text)}", file=self.stream, flush=True)
            self._lost = 0
        except OSError:
            self._lost += 1


class RichProgress(RunProgress):
    """Two bars: the present task and the whole run."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
        self.bars = Progress(
            TextColumn("{task.description}", justify="left", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._whole = self.bars.add_task("whole run", total=None, info="")
        self._part = self.bars.add_task("", total=None, info="", visible=False)
        self._read, self._terms = 0.0, ""

    def run_started(
        self, method: str, scenario: str, tasks: int, steps: Sequence[int], *, closed_form: bool = False
    ) -> None:
        """See the base class."""
        super().run_started(method, scenario, tasks, steps, closed_form=closed_form)
        plan = describe_steps(steps, closed_form)
        self.console.print(f"[bold]{method}[/] on [bold]{scenario}[/]: {tasks} tasks, {plan}")
        self.bars.update(self._whole, total=sum(steps) or None)
        self.bars.start()

    def task_started(self, name: str, number: int, tasks: int, steps: int, done: int) -> None:
        """See the base class."""
        super().task_started(name, number, tasks, steps, done)
        self._read = 0.0
        description = f"task {number}/{tasks} {printable(name)}"
        self.bars.update(self._whole, completed=self._started[number - 1] + done)
        self.bars.reset(self._part, total=steps, completed=done, description=description, visible=True, info="")

    def step(self, report: StepReport) -> None:
        """See the base class."""
        super().step(report)
        now = time.perf_counter()
        if now - self._read > 0.2:  # reading the loss waits for the device
            self._read, self._terms = now, describe_terms(report, "  ")
        rate, rest = self.pace.samples_per_second, self.pace.seconds_left(self._steps - report.step - 1)
        info = f"{self._terms}{rate:.0f} samples/s  {format_seconds(rest)} left"
        self.bars.update(self._part, advance=1, info=info)
        self.bars.update(self._whole, advance=1, info=f"{format_seconds(self.pace.seconds_left())} left")

    def evaluation_started(self, after: str, tasks: int) -> None:
        """See the base class."""
        super().evaluation_started(after, tasks)
        self.bars.refresh()  # a task shorter than the refresh interval still shows its last step
        self.bars.reset(self._part, total=tasks, description=f"evaluating {printable(after)}", visible=True, info="")

    def evaluated(self, task: str, accuracy: float) -> None:
        """See the base class."""
        self.bars.update(self._part, advance=1, info=f"{printable(task)} {accuracy:.1f} %")

    def row_finished(self, after: str, row: list[float]) -> None:
        """See the base class."""
        super().row_finished(after, row)
        values = " ".join(f"{value:5.1f}" for value in row)
        line = f"{printable(after):<22} {values}   mean {sum(row) / len(row):5.1f}"
        self.bars.console.print(line, highlight=False, markup=False)

    def note(self, text: str) -> None:
        """See the base class."""
        self.bars.console.print(printable(text), markup=False)

    def close(self) -> None:
        """See the base class."""
        self.bars.stop()


def progress_for(stream: TextIO | None = None) -> RunProgress:
    """Bars if standard output is a terminal, else plain lines."""
    stream = stream or sys.stdout
    return RichProgress() if stream.isatty() else PlainProgress(stream)


def describe_steps(steps: Sequence[int], closed_form: bool) -> str:
    """``81 optimiser steps each``, or what a method does instead."""
    if closed_form:
        return "one pass over each task's images"
    return f"{max(steps)} optimiser steps each" if steps else "nothing is learnt"


def describe_terms(report: StepReport, separator: str = "") -> str:
    """``loss 1.234 (image 0.5, text 0.7)`` and the separator; nothing where there is no loss."""
    terms = report.log.values()
    if not terms:
        return ""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in terms.items() if name != "loss")
    return f"loss {terms['loss']:.3f}" + (f" ({parts})" if parts else "") + separator


def format_seconds(seconds: float | None) -> str:
    """``1:02:03`` or ``02:03``; ``--:--`` while unknown."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"

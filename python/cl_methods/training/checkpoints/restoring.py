"""Where a run goes on: the newest checkpoint that is intact, with all that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cl_methods.training.checkpoints.folder import Checkpoint, DamagedError, TrainingProgress
from cl_methods.training.checkpoints.run_directory import RunDirectory
from cl_methods.training.rows import Rows


@dataclass
class Restored:
    """A moment of a run that can be continued.

    Attributes:
        rows: the accuracies known.
        checkpoint: the newest that can be gone on from; None for the beginning.
        before: the method's state after the last task finished by then; None if there is none.
        method_state: at ``checkpoint``, if that is inside a task.
        optimizer_state: the same.
        training: what it has cost.
        sentences: what is damaged and what was taken instead, for the log.
    """

    rows: Rows
    checkpoint: Checkpoint | None = None
    before: dict[str, Tensor] | None = None
    method_state: dict[str, Tensor] | None = None
    optimizer_state: dict[str, Any] | None = None
    training: TrainingProgress = field(default_factory=TrainingProgress)
    sentences: list[str] = field(default_factory=list)


def restore(directory: RunDirectory, tasks: int) -> Restored:
    """Read the newest checkpoint whose files are intact, whose task can be begun and whose rows are known.

    A checkpoint inside task t needs the finished checkpoint of task t - 1, which ``before_task`` starts from, and one after
    task t the rows of all tasks before it, which cannot be measured any more. What lacks something is passed over, with
    a sentence; the beginning is always there.

    Args:
        directory: of the run.
        tasks: how many the run has.
    """
    rows, sentences = _rows(directory, tasks)
    found = directory.found()
    for checkpoint in reversed(found):
        try:
            restored = _read(checkpoint, found, rows, tasks)
        except DamagedError as error:
            sentences.append(f"checkpoint {checkpoint.path.name} is passed over: {error}")
            continue
        restored.sentences = sentences
        return restored
    if found:
        sentences.append(
            "no checkpoint can be gone on from: training starts at the beginning, with the same random numbers"
        )
    return Restored(rows, sentences=sentences)


def _rows(directory: RunDirectory, tasks: int) -> tuple[Rows, list[str]]:
    try:
        return Rows.checked(directory.read_json("rows.json"), tasks), []
    except (DamagedError, ValueError) as error:
        text = str(error) if isinstance(error, DamagedError) else f"{directory.path / 'rows.json'} is damaged ({error})"
        return Rows(), [f"{text}; the rows in the checkpoints are used instead"]


def _read(checkpoint: Checkpoint, found: list[Checkpoint], known: Rows, tasks: int) -> Restored:
    checkpoint.check()
    rows = _longer(known, checkpoint, tasks)
    if rows.zero_shot is None or len(rows.accuracy) < checkpoint.task:
        raise DamagedError(f"the accuracies before task {checkpoint.task + 1} are lost, and are measured again")
    state = checkpoint.method_state()
    optimizer_state, training = checkpoint.training_state()
    if checkpoint.step is None:
        return Restored(rows, checkpoint, before=state, training=training)
    before = None
    if checkpoint.task > 0:
        needed = [other for other in found if other.step is None and other.task == checkpoint.task - 1]
        if not needed:
            raise DamagedError(f"the checkpoint after task {checkpoint.task} that it needs is missing")
        needed[0].check()
        before = needed[0].method_state()
    return Restored(rows, checkpoint, before, state, optimizer_state, training)


def _longer(known: Rows, checkpoint: Checkpoint, tasks: int) -> Rows:
    """The rows of ``rows.json``, or those of the checkpoint where these are more."""
    if known.zero_shot is not None and len(known.accuracy) >= checkpoint.task:
        return known
    try:
        stored = Rows.checked(checkpoint.rows(), tasks)
    except ValueError as error:
        raise DamagedError(f"{checkpoint.path} has rows that cannot be used ({error})") from error
    return stored if len(stored.accuracy) >= len(known.accuracy) and stored.zero_shot is not None else known

"""What is said, and kept, when training cannot go on."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.backbone.smaller_parts import is_out_of_memory
from cl_methods.datasets.images import DataError
from cl_methods.sharding import is_sharded, local
from cl_methods.training.checkpoints import RunDirectory
from cl_methods.training.checkpoints.atomic import WriteError
from cl_methods.training.loop import NonFiniteLossError
from cl_methods.worker_death import is_worker_death

_CAUGHT = re.compile(r"Caught \w+ in (DataLoader worker process \d+)")
"""How an error begins that a data-loading process met; a traceback of that process follows."""


Failure = RuntimeError | MemoryError | DataError
"""What ends a run and is explained."""


class NoMemoryError(RuntimeError):
    """The host or the GPU has no memory left. The message says what is kept and what needs less."""


class WorkerDiedError(RuntimeError):
    """A data-loading process was killed or crashed. The message says what is kept and what to try."""


def hear_no_more_of(error: BaseException) -> None:
    """Before the death of a data-loading process is explained: do not let it be reported a second time in the middle of that.

    torch raises from its handler of SIGCHLD, and would again for every further child that ends, stops or goes on. The run ends
    here; later ones in this process still notice within seconds, when a batch does not come.
    """
    if is_worker_death(error) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def last_good(directory: RunDirectory) -> str:
    """Where the last state that was written is; other processes than the one that writes may not see the directory."""
    if not ranks.first():
        return f"What the first process had written to {directory.path} is whole."
    found = directory.found()
    if not found:
        return f"No checkpoint had been written to {directory.path} yet."
    return f"The last good state is {found[-1].path}."


def explain(error: Failure, directory: RunDirectory) -> Failure:
    """The error that a run ends with: itself, or one that says more.

    A loss that is not finite is also described in ``diverged.json``.
    """
    if isinstance(error, NonFiniteLossError):
        text = f"{error} {last_good(directory)} The same settings would diverge again: start a new run with others."
        found = {"task": error.task, "step": error.step, "terms": error.terms, "message": text}
        try:
            if ranks.first():
                directory.write_json("diverged.json", found)
        except WriteError as further:
            text += f" ({further})"
        return NonFiniteLossError(text, task=error.task, step=error.step, terms=error.terms)
    if isinstance(error, DataError):
        return DataError(f"{str(error).rstrip('. ')}. {last_good(directory)} With that mended, --resume goes on")
    if is_out_of_memory(error):
        reason = (str(error).splitlines() or ["out of memory"])[0].rstrip(". ")
        return NoMemoryError(
            f"no memory left ({reason}). {last_good(directory)} Go on with --resume and a --memory-budget below what there is "
            "(`--dry-run` says what a step needs): batches then go through the model in parts, and results do not depend on it"
        )
    if is_worker_death(error):
        return worker_died(error, f"{last_good(directory)} Go on with --resume")
    if (caught := _CAUGHT.match(str(error))) is not None:
        said = str(error).rstrip().splitlines()[-1]
        return RuntimeError(
            f"{said} (in {caught[1]}, which reads images; --workers 0 --debug shows where). {last_good(directory)}"
        )
    return error


def worker_died(error: BaseException, remedy: str) -> WorkerDiedError:
    """What is said of a data-loading process that died: torch's reason, and what to do."""
    reason = (str(error).splitlines() or [""])[0].rstrip(". ")
    return WorkerDiedError(
        f"{reason}: a process that reads images has died, most often for want of memory. {remedy}; fewer --workers need less "
        "memory, 0 reads in the main process. Results do not depend on it"
    )


def require_finite(values: Iterable[tuple[str, Tensor]], task: str, step: int) -> None:
    """Look at every parameter before it is stored: gradients can overflow where the loss did not.

    One reduction per tensor and one wait for the device; of sharded ones every process looks at its own rows.

    Raises:
        NonFiniteLossError: one of them holds NaN or an infinity.
    """
    named = [(name, value.detach()) for name, value in values if value.is_floating_point()]
    if not named:
        return
    looked_at = torch.stack([torch.isfinite(local(value)).all() for _, value in named])
    if any(is_sharded(value) for _, value in named):
        broken = (~looked_at).float()
        ranks.sum_([broken])
        looked_at = broken == 0
    whole = looked_at.tolist()
    wrong = [name for (name, _), finite in zip(named, whole, strict=True) if not finite]
    if wrong:
        raise NonFiniteLossError(
            f"weights are not finite after step {step} of task {task}, though every loss was: {', '.join(wrong[:4])}"
            f"{' …' if len(wrong) > 4 else ''}. Lower the learning rate, or train in float32.",
            task=task,
            step=step,
            terms={},
        )

"""What a run goes on from: the method as an earlier run or an adapter file left it, or an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cl_methods.backbone import MINI_WEIGHTS
from cl_methods.methods.base import Method
from cl_methods.methods.find import named_in_data
from cl_methods.training.export.learnt import (
    ADAPTER,
    ADAPTER_CONFIG,
    MODEL,
    MODEL_CONFIG,
    Adapter,
    ExportError,
    describe,
    read_learnt,
)
from cl_methods.weights import fingerprint

_OPTION = "weights"
_EXPORTED = (ADAPTER, ADAPTER_CONFIG, MODEL, MODEL_CONFIG, MINI_WEIGHTS)


@dataclass(frozen=True)
class StartingPoint:
    """A method's state after the tasks that it has learnt.

    Attributes:
        path: the run's directory, or the folder of the adapter file.
        learnt: what it says of itself.
        state: the method's tensors.
    """

    path: Path
    learnt: Adapter
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> StartingPoint:
        """Read the state after the last finished task.

        Raises:
            ExportError: there is none, a file is damaged, or nothing says how many tasks it has learnt.
        """
        folder = _folder(path)
        learnt, state = read_learnt(folder, option=_OPTION)
        if not learnt.tasks:
            raise ExportError(
                f"{_OPTION}: {folder} does not say which tasks it has learnt, so nothing can be added to them; "
                "export it again from the run or checkpoint that it was made from"
            )
        return cls(folder, learnt, state)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the fingerprint is over names, shapes and values of the state."""
        return {
            "source": str(self.path),
            "method": self.learnt.method,
            "tasks": self.learnt.tasks,
            "fingerprint": fingerprint(self.state),
        }

    def put_into(self, method: Method, *, trains: bool = True) -> None:
        """Give ``method``, newly built, the state; the tasks that it learns from now on come after those of the state.

        Args:
            method: over the weights that the state was learnt on.
            trains: whether it is going to learn further tasks.

        Raises:
            ExportError: it is another method, has another backbone or other settings, or cannot go on without earlier images.
        """
        if type(method) is not named_in_data(self.learnt.method, self.path):
            raise ExportError(_other_method(self.path, self.learnt.method, method.name))
        if trains and method.joint:
            raise ExportError(
                f"{_OPTION}: {method.name} learns all tasks together, so none can follow those of {self.path}"
            )
        if trains and type(method).recall is not Method.recall:
            raise ExportError(
                f"{_OPTION}: {method.name} learns with images of earlier tasks, and this run has none of those of {self.path} "
                f"({', '.join(self.learnt.tasks)}); it can be measured: --evaluation.only"
            )
        origin = method.backbone.origin
        expected = self.learnt.base_fingerprint
        if origin is not None and expected not in (None, origin.fingerprint):
            raise ExportError(
                f"{_OPTION}: {self.path} was learnt on weights with fingerprint {str(expected)[:12]} ({self.learnt.model}, "
                f"{self.learnt.pretrained or 'its own'}), {origin.source} has {origin.fingerprint[:12]}; "
                "give the same with --model and --pretrained"
            )
        state = method.carried_state(self.state)
        try:
            method.load_state_dict({name: value.to(method.backbone.device) for name, value in state.items()})
        except (RuntimeError, KeyError) as error:
            text = " ".join(str(error).split())[:300]
            raise ExportError(
                f"{_OPTION}: {self.path} does not fit {method.name} with these settings ({text}); leave out the options "
                "--method.… that say how large it is"
            ) from error


def start_sentence(started: dict[str, Any]) -> str:
    """One line for logs from :meth:`StartingPoint.as_dict`."""
    tasks = started["tasks"]
    return (
        f"goes on from {started['source']}: {started['method']} after {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} "
        f"({', '.join(tasks)}), fingerprint {started['fingerprint'][:12]}"
    )


def decided_by(path: Path, method: str | None) -> dict[str, Any]:
    """Settings that follow from ``--weights PATH``, as a file of settings holds them; no tensor is read.

    An exported model becomes the ``model`` of the run. A run or an adapter file decides method, settings and the weights under
    it, and stays under ``weights``.

    Args:
        path: directory of a run, or folder, or file in it, that ``clk export`` wrote.
        method: the one that was asked for; None for that of the path.

    Raises:
        ExportError: there is nothing of the kind, or it belongs to another method than was asked for.
    """
    folder = _folder(path)
    if not (folder / ADAPTER_CONFIG).is_file() and _holds_model(folder):
        return {"model": f"local-dir:{folder}", "pretrained": None, _OPTION: None}
    learnt = describe(folder, _OPTION)
    own = (
        method is not None and ":" in method and ":" in learnt.method
    )  # whether they are the same is known when they are loaded
    if method not in (None, learnt.method) and not own:
        raise ExportError(_other_method(folder, learnt.method, str(method)))
    base = {"model": learnt.model, "pretrained": learnt.pretrained}
    if _holds_model(folder):  # exported together with the frozen CLIP
        base = {"model": f"local-dir:{folder}", "pretrained": None}
    return {**base, "method": {"name": learnt.method, **learnt.settings}, _OPTION: str(folder)}


def _holds_model(folder: Path) -> bool:
    return (folder / MINI_WEIGHTS).is_file() or ((folder / MODEL_CONFIG).is_file() and (folder / MODEL).is_file())


def _folder(path: Path) -> Path:
    """The folder itself, or that of a file as ``clk export`` names them.

    Raises:
        ExportError: there is no such folder or file.
    """
    if not path.exists():
        raise ExportError(f"{_OPTION}: {path} does not exist")
    if path.is_dir():
        known = ("run.json", ADAPTER_CONFIG, MODEL_CONFIG, MINI_WEIGHTS)
        if not any((path / name).is_file() for name in known):
            raise ExportError(
                f"{_OPTION}: {path} holds neither a run nor what `clk export` writes (none of {', '.join(known)})"
            )
        return path
    if path.name not in _EXPORTED:
        raise ExportError(
            f"{_OPTION}: {path} is no file that `clk export` writes; weights of CLIP in other forms are given with --model and "
            "--pretrained, checkpoints of MoE-Adapters' public code go through `clk export` first"
        )
    return path.parent


def _other_method(path: Path, found: str, asked: str) -> str:
    return (
        f"{_OPTION}: {path} is of {found}, and the method of this run is {asked}. What {found} adds to CLIP belongs to it alone; "
        f"if it trains CLIP itself, `clk export {path} --output DIR` makes a model that every method starts from (--weights DIR)"
    )

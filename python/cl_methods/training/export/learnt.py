"""What a run or an adapter file has learnt: the method, its settings and its tensors, after every check that the files allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cl_methods.training.checkpoints import DamagedError, RunDirectory
from cl_methods.weights.activation import read_json

MODEL, MODEL_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "cl_methods adapter"


class ExportError(ValueError):
    """What was asked for cannot be exported or loaded. The message says what is in the way and what to do."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter file's configuration says.

    Attributes:
        method: name of the method.
        settings: of the method, plain values.
        model, pretrained: architecture and weights that the run was given.
        base_fingerprint: of the weights that the adapters were trained on; None if unknown.
        seed: of the run; the method is built with it again.
        tasks: names of the learnt tasks, in order.
        source: what the file was made from.
    """

    method: str
    settings: dict[str, Any]
    model: str
    pretrained: str | None
    base_fingerprint: str | None
    seed: int
    tasks: list[str]
    source: str


def describe(source: Path, option: str = "source") -> Adapter:
    """What a run or an adapter file says of itself, all tasks of the run counted; no tensor is read.

    Args:
        source: directory of the run, or folder of the adapter file.
        option: what it was given as, for messages.

    Raises:
        ExportError: it holds neither, or an adapter file of another version.
        DamagedError: a description cannot be read.
    """
    if (source / ADAPTER_CONFIG).is_file():
        return _checked(_adapter_config(source), source / ADAPTER_CONFIG)
    return _described_run(source, _description(source, option), None)


def read_learnt(source: Path, task: int | None = None, option: str = "source") -> tuple[Adapter, dict[str, Tensor]]:
    """The same with the method's tensors, after one of a run's tasks; files of a run are compared with their checksums.

    Args:
        source: directory of the run, or folder of the adapter file.
        task: 1-based, of a run; None for the last that is finished.
        option: what ``source`` was given as, for messages.

    Raises:
        ExportError: it holds neither, no finished task, or not the one that was asked for; a file is damaged.
    """
    if (source / ADAPTER_CONFIG).is_file():
        if task is not None:
            raise ExportError(f"task: {source} is an adapter file after its last task; only runs have earlier ones")
        return read_adapter(source)
    description = _description(source, option)
    finished = {one.task + 1: one for one in RunDirectory(source).found() if one.step is None}
    if not finished:
        raise ExportError(f"{option}: {source} has no checkpoint of a finished task")
    chosen = max(finished) if task is None else task
    if chosen not in finished:
        raise ExportError(
            f"task: {source} has checkpoints after tasks {', '.join(map(str, finished))}, not after {task}"
        )
    try:
        finished[chosen].check()
        state = finished[chosen].method_state()
    except DamagedError as error:
        others = ", ".join(str(number) for number in finished if number != chosen)
        rest = f", or take the state after another task (--task {others})" if others and option == "source" else ""
        raise ExportError(f"{option}: {error}; restore it from a copy{rest}") from error
    return _described_run(source, description, chosen), state


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """Configuration and tensors of an adapter file.

    Raises:
        ExportError: the folder holds none, or one of another version.
    """
    content = _adapter_config(folder)
    try:
        state = load_file(folder / ADAPTER)
    except SafetensorError as error:
        raise ExportError(f"{folder / ADAPTER} is not a complete safetensors file ({error}); copy it again") from error
    return _checked(content, folder / ADAPTER_CONFIG), state


def _adapter_config(folder: Path) -> dict[str, Any]:
    content = read_json(folder / ADAPTER_CONFIG)
    if content.pop("format", None) != FORMAT or not (folder / ADAPTER).is_file():
        raise ExportError(
            f"{folder} holds no adapter file: expected {ADAPTER} and {ADAPTER_CONFIG}, as `clk export` writes"
        )
    version = content.pop("version", None)
    if version != 1:
        raise ExportError(f"{folder / ADAPTER_CONFIG}: version {version!r} is not known here; expected 1")
    fields = Adapter.__dataclass_fields__
    wrong = sorted(fields.keys() ^ content.keys())
    if wrong:
        raise ExportError(f"{folder / ADAPTER_CONFIG}: missing or unknown are {', '.join(wrong)}")
    return content


def _checked(content: dict[str, Any], path: Path) -> Adapter:
    """The configuration with values of the right kind, which nothing but this package has to have written."""
    try:
        return TypeAdapter(Adapter).validate_python(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:3])
        raise ExportError(f"{path}: {wrong}; expected what this package writes") from error


def _description(run: Path, option: str) -> dict[str, Any]:
    description = RunDirectory(run).read_json("run.json")
    if description is None:
        raise ExportError(f"{option}: {run} holds no run (no run.json)")
    return description


def _described_run(run: Path, description: dict[str, Any], tasks: int | None) -> Adapter:
    """A run as its adapter file would describe it after so many of its own tasks; those that it started from come first."""
    try:
        config, started = description["config"], description.get("started_from") or {}
        names = description.get("tasks") or (RunDirectory(run).read_json("result.json") or {}).get("tasks") or []
        content = {
            "method": config["method"]["name"],
            "settings": {name: value for name, value in config["method"].items() if name != "name"},
            "model": config["model"],
            "pretrained": config["pretrained"],
            "base_fingerprint": (description.get("weights") or {}).get("fingerprint"),
            "seed": config["seed"],
            "tasks": [*started.get("tasks", []), *names[:tasks]],
            "source": f"run {run.resolve().name}",
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{run / 'run.json'} is not what `clk run` writes ({error!r}); restore it from a copy"
        ) from error
    return _checked(content, run / "run.json")

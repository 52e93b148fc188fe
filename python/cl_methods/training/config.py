"""Everything that decides the result of a run, as one dataclass; the command line is a skin over it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from cl_methods.checks import check_field
from cl_methods.components.compiled_blocks import Compile
from cl_methods.evaluation.accuracy import EvaluationOptions
from cl_methods.methods.base import Method
from cl_methods.scenarios import ScenarioOptions
from cl_methods.training.checkpoints import CheckpointOptions
from cl_methods.training.memory.levers import Levers, Offload
from cl_methods.training.memory.optimizer_state import require_library
from cl_methods.training.sizes import parse_size

WITHOUT_EFFECT = (
    "workers",
    "weights",
    "memory_budget",
    "distributed",
    "compile",
    "offload",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.feature_memory",
    "data.root",
    "data.reference_images",
    "data.reference_captions",
    "data.cache",
    "data.cache_gib",
)
"""Settings that cannot change a result, or (memory budget, compile, sharding, offload) its last bits at most, or whose effect the
scenario's fingerprint covers: a resumed run may change them."""

PER_PROCESS = (
    "workers",
    "data.root",
    "data.reference_images",
    "data.reference_captions",
    "data.cache",
    "data.cache_gib",
)
"""Settings that may differ between the processes of a run: each machine has places of its own."""

_ADDED = {"precision": "fp32", "optimizer_state": "fp32"}
"""What runs did before there were these settings."""


@dataclass
class RunConfig:
    """One method over one scenario.

    Attributes:
        method: a name that `clk methods` lists, or MODULE:CLASS or PATH.py:CLASS for your own; several, separated by commas,
            run one after the other.
        settings: the method's own settings; naming another method resets them to its defaults.
        scenario: a name that `clk methods` lists.
        order: order of the tasks: I, II, both (`I,II`), or for folders the task names separated by
            commas; for cil the order of the classes.
        seed: of everything random; several like methods.
        model: `mini`, or an open_clip model name.
        pretrained: checkpoint on disk or open_clip tag; None for `mini`.
        weights: go on from an earlier run, or from what `clk export` wrote: its folder, or a file in it. Method, settings and model
            are then those of it.
        device: `cpu`, `cuda`, `cuda:1` …; `auto` takes a GPU if there is one.
        workers: data-loading processes; the number changes the speed and nothing else.
        limit_tasks: learn and evaluate only the first tasks.
        limit_iterations: shorten the training of every task; methods without optimiser steps are not affected.
        data: where the scenario's data is and how it is split.
        evaluation: label spaces, split, and how many images.
        checkpoint: when checkpoints are written.
        memory_budget: most memory for a training step, such as `8GiB`: batches then go through the model in parts, with the same
            losses and gradients, see docs/memory.md. None: all at once.
        distributed: with `torchrun`, every process holds all weights, gradients and optimiser state (`replicated`), or its part
            of each (`fsdp`, for methods that train the whole model), see docs/distributed.md.
        compile: `blocks` runs the model's residual blocks through torch.compile in training steps, `cuda_graphs` replays them as
            CUDA graphs besides; see docs/throughput.md.
        precision: `bf16` computes the towers that train in 16 bits, from fp32 weights to fp32 features and gradients.
        optimizer_state: `8bit` keeps AdamW's moments in 8 bits (needs torchao); `host` keeps the optimiser's state, and takes its
            steps, in host memory, where the model is on a GPU.
        offload: where the model is on a GPU, keep in host memory `averages` of weights; `anchors`, which weights are compared or
            mixed with (the start of the task, EWC's importances) and which are read piece by piece; or `all` of both.
    """

    method: str
    settings: Any
    scenario: str = "mini"
    order: str = "I"
    seed: int = 0
    model: str = "mini"
    pretrained: str | None = None
    weights: Path | None = None
    device: str = "auto"
    workers: int = 0
    limit_tasks: int | None = None
    limit_iterations: int | None = None
    data: ScenarioOptions = field(default_factory=ScenarioOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    memory_budget: str | None = None
    distributed: Literal["replicated", "fsdp"] = "replicated"
    compile: Compile = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer_state: Literal["fp32", "8bit", "host"] = "fp32"
    offload: Literal["none", "averages", "anchors", "all"] = "none"

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers: expected a number >= 0, got {self.workers}")
        for name in ("limit_tasks", "limit_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        if self.memory_budget is not None:
            parse_size(self.memory_budget)
        if self.distributed not in ("replicated", "fsdp"):
            raise ValueError(f"distributed: expected replicated or fsdp, got {self.distributed!r}")
        if self.compile not in get_args(Compile):
            raise ValueError(f"compile: expected one of {', '.join(get_args(Compile))}, got {self.compile!r}")
        if self.compile != "none" and self.memory_budget is not None:
            raise ValueError(
                f"compile: got {self.compile!r} with memory_budget {self.memory_budget!r}; expected one of the two, since the plan "
                "counts what blocks keep that are not compiled"
            )
        if self.compile != "none" and self.distributed == "fsdp":
            raise ValueError(
                f"compile: got {self.compile!r} with distributed fsdp, which gathers a block's weights while it runs; "
                "expected one of the two"
            )
        for name, allowed in (
            ("precision", ("fp32", "bf16")),
            ("optimizer_state", ("fp32", "8bit", "host")),
            ("offload", get_args(Offload)),
        ):
            check_field(self, name, allowed)
        require_library(self.optimizer_state)
        for name, plain in (("optimizer_state", "fp32"), ("offload", "none")):
            if self.distributed == "fsdp" and getattr(self, name) != plain:
                raise ValueError(
                    f"{name}: works on whole weights, got {getattr(self, name)} with distributed fsdp, which shares out "
                    f"averages, anchors and the optimiser's state; expected {plain}, or distributed replicated"
                )

    def learns(self, method: Method | type[Method]) -> bool:
        """Whether the run trains ``method``, rather than measuring it alone."""
        return method.trains and not self.evaluation.only

    @property
    def memory_bytes(self) -> int | None:
        """:attr:`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_size(self.memory_budget)

    @property
    def plans_memory(self) -> bool:
        """Whether a step's memory is predicted before the run: with a budget or a lever, and plain blocks."""
        return self.compile == "none" and (self.memory_budget is not None or bool(self.levers.options))

    @property
    def levers(self) -> Levers:
        """What saves memory besides the budget."""
        return Levers(self.precision, self.optimizer_state, self.offload)

    def effective_settings(self) -> Any:
        """The method's settings after ``limit_iterations``, which bounds every stage's ``iterations`` or ``…_iterations``."""
        if self.limit_iterations is None:
            return self.settings
        names = [entry.name for entry in dataclasses.fields(self.settings)]
        lengths = [name for name in names if name == "iterations" or name.endswith("_iterations")]
        changes: dict[str, Any] = {name: min(getattr(self.settings, name), self.limit_iterations) for name in lengths}
        if "warmup" in names:
            changes["warmup"] = min(self.settings.warmup, changes["iterations"])
        if "epochs" in names:
            changes["epochs"] = None
        return dataclasses.replace(self.settings, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, for YAML and JSON: the method's settings stand beside its name under ``method``."""
        values = dataclasses.asdict(self)
        values["method"] = {"name": self.method, **values.pop("settings")}
        return _plain(values)


_OLDER = {"evaluation.only": False, "evaluation.novelty": []}
"""Settings that runs of earlier versions did not have, with what they did."""


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a configuration that all processes of a run have in common."""
    return {key: value for key, value in flatten(config).items() if key not in PER_PROCESS}


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a configuration without those that cannot change a result."""
    found = {**_ADDED, **flatten(config)}
    if found["optimizer_state"] == "host":  # the same state elsewhere
        found["optimizer_state"] = "fp32"
    return {key: value for key, value in found.items() if key not in WITHOUT_EFFECT}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each deciding setting that differs between two configurations."""
    old, new = {**_OLDER, **deciding(before)}, deciding(now)
    missing = "(not set)"  # also what a setting that is None now was before it existed
    return [
        f"{key} was {old.get(key, missing)}, now {new.get(key, missing)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value

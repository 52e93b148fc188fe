"""A record: the rows of one suite with the machine, the versions and the commit that they were measured with."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import cl_kernels
from cl_methods.bench.rows import OURS, Row, over_ours
from cl_methods.training.environment import describe_environment

CHECKOUT = Path(cl_kernels.__file__).parents[1]
"""Where the repository is, if the packages were installed from one in place."""


@dataclass(frozen=True)
class Record:
    """One run of one suite.

    Attributes:
        suite: which one.
        setting: what was asked for: model, batch, threads …; only records with the same setting are comparable.
        machine: the hardware, in words; only records of the same machine are comparable.
        versions: of Python, torch and the rest.
        commit: of the checkout; "" without one.
        dirty: whether the checkout differed from the commit.
        date: when it was made, UTC, ISO 8601.
        rows: what was counted and measured.
    """

    suite: str
    setting: dict[str, Any]
    machine: str
    versions: dict[str, Any]
    commit: str
    dirty: bool
    date: str
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What two records must share to be compared."""
        setting = ", ".join(f"{name} {value}" for name, value in sorted(self.setting.items()))
        return self.machine, self.suite, setting

    def as_dict(self) -> dict[str, Any]:
        """For JSON; every peer's row says how many times ours it costs."""
        ratios = over_ours(self.rows)
        rows = []
        for row in self.rows:
            entry = {"suite": self.suite, **row.as_dict()}
            if row.implementation != OURS and (row.case, row.implementation) in ratios:
                entry["over_ours"] = {
                    name: round(value, 4) for name, value in ratios[row.case, row.implementation].items()
                }
            rows.append(entry)
        values = {
            name: getattr(self, name) for name in ("suite", "setting", "machine", "versions", "commit", "dirty", "date")
        }
        return {**values, "rows": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """From JSON.

        Raises:
            KeyError: something is missing.
            TypeError: something is of another kind.
        """
        names = ("suite", "setting", "machine", "versions", "commit", "dirty", "date")
        return cls(**{name: values[name] for name in names}, rows=[Row.from_dict(row) for row in values["rows"]])


def new_record(suite: str, setting: dict[str, Any], rows: Sequence[Row], device: torch.device) -> Record:
    """A record of ``rows``, made here and now on ``device``."""
    versions = describe_environment(device)
    hardware = versions.pop("device")
    versions.pop("threads")
    commit, dirty = checked_out()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(suite, setting, f"{hardware}, {cores} cores", versions, commit, dirty, date, list(rows))


def checked_out() -> tuple[str, bool]:
    """The commit of the checkout, and whether anything in it differs from the commit; ``("", False)`` without one."""
    git = shutil.which("git")
    if git is None or not (CHECKOUT / ".git").exists():
        return "", False
    commit = _git(git, "rev-parse", "HEAD")
    return commit, bool(commit) and bool(_git(git, "status", "--porcelain"))


def _git(git: str, *arguments: str) -> str:
    done = subprocess.run([git, "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""

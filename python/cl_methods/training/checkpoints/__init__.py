"""What a run leaves on disk to go on from, written whole or not at all and checked when read, and the going on."""

from __future__ import annotations

from cl_methods.training.checkpoints.folder import Checkpoint, DamagedError, RunDirectoryError, TrainingProgress
from cl_methods.training.checkpoints.run_directory import CheckpointOptions, RunDirectory

__all__ = [
    "Checkpoint",
    "CheckpointOptions",
    "DamagedError",
    "RunDirectory",
    "RunDirectoryError",
    "TrainingProgress",
]

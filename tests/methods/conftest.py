"""The tiny CLIP, its tasks and batches."""

from __future__ import annotations

from tiny_tasks import backbone, batches, reference, tasks

__all__ = ["backbone", "batches", "reference", "tasks"]

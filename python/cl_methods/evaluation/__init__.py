"""Evaluation: accuracy matrix, metrics, reports and figures."""

from cl_methods.evaluation.metrics import class_incremental_metrics, forgetting, mtil_metrics

__all__ = ["class_incremental_metrics", "forgetting", "mtil_metrics"]

"""Evaluation: accuracy matrix, metrics, reports and figures."""

from cl_methods.evaluation.metrics import forgetting, mtil_metrics

__all__ = ["forgetting", "mtil_metrics"]

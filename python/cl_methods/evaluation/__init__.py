"""Evaluation: accuracy matrix, metrics, reports and figures."""

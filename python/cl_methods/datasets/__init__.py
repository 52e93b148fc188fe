"""Datasets on disk: what each one is and where to find it."""

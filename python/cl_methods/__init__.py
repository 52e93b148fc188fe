"""Continual learning of vision-language models: methods, scenarios, evaluation and the ``clk`` command.

The heavy work runs in :mod:`cl_kernels`; the models are open_clip's. Importing this package imports neither.
"""

"""A run over the tiny scenario with the tiny method, wherever a test asks for it."""

from __future__ import annotations

import pytest
import torch
from fakes import TinyConfig, TinyMethod, tiny_backbone, tiny_scenario

from cl_methods.training import building
from cl_methods.training import run as run_module
from cl_methods.training.config import RunConfig


@pytest.fixture
def tiny_run(monkeypatch):
    """``tiny_run(output, **settings)`` runs the tiny method; ``method=`` takes another class."""

    def start(output, *, method=TinyMethod, resume=False, overwrite=False, progress=None, scenario=None, **settings):
        def build(config, scenario, device):
            torch.manual_seed(config.seed)
            return method(tiny_backbone(), config.effective_settings(), scenario.reference)

        monkeypatch.setattr(run_module, "build_method", build)
        monkeypatch.setattr(building, "load_scenario", lambda name, options, order: scenario or tiny_scenario())
        tiny = settings.pop("settings", TinyConfig())
        config = RunConfig(method=method.name, settings=tiny, scenario="tiny", device="cpu", **settings)
        return run_module.run(config, output, resume=resume, overwrite=overwrite, progress=progress)

    return start

"""The files of settings that ship: complete, correct, and good for a short run of every method under every protocol."""

from __future__ import annotations

import pytest
import torch
from shortened import shortened
from tiny_clip import build_backbone

from cl_methods.datasets.task import Reference, Task
from cl_methods.evaluation.accuracy import EvaluationOptions, LabelSpace, measure_row
from cl_methods.methods import METHODS
from cl_methods.methods.settings import FILES, build_settings, scenario_settings
from cl_methods.training.task import TaskTraining

PROTOCOLS: dict[str, LabelSpace] = {"mtil": "task", "mtil_few_shot": "task", "cil": "seen"}


def test_every_method_ships_a_file_and_every_file_has_a_method() -> None:
    assert {entry.name for entry in FILES.iterdir()} == {f"{name}.yaml" for name in METHODS}
    assert scenario_settings("a method of your own", "mtil") == {}


@pytest.mark.parametrize("name", METHODS)
def test_the_file_has_a_section_for_every_protocol_and_for_mini(name: str) -> None:
    text = (FILES / f"{name}.yaml").read_text(encoding="utf-8")
    for scenario in (*PROTOCOLS, "mini"):
        assert f"\n{scenario}:" in f"\n{text}", scenario
        assert isinstance(METHODS[name].default_config(scenario), METHODS[name].Config)
    assert METHODS[name].default_config("a scenario nobody knows") == METHODS[name].Config()


def test_wrong_settings_are_named() -> None:
    config = METHODS["moe_adapters"].Config
    with pytest.raises(ValueError, match=r"MoEAdaptersConfig: no setting expert; known are .*experts"):
        build_settings(config, {"expert": 3})
    with pytest.raises(ValueError, match=r"DDASConfig: no setting ddas\.treshold"):
        build_settings(config, {"ddas": {"treshold": 1.0}})
    with pytest.raises(ValueError, match="MoEAdaptersConfig: experts: Input should be a valid integer"):
        build_settings(config, {"experts": "many"})
    assert build_settings(config, {"ddas": {"threshold": 1.0}}).ddas.threshold == 1.0


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", METHODS)
def test_default_settings_run(name: str, protocol: str, tasks: list[Task], reference: Reference) -> None:
    """Two tasks of two steps each; what is cut down is only what makes a run long, or needs weights on disk."""
    settings = shortened(METHODS[name].default_config(protocol))
    torch.manual_seed(0)
    method = METHODS[name](build_backbone(), settings, reference)
    if method.trains:
        for index in [0] if method.joint else range(len(tasks)):
            TaskTraining(method, index, tasks).execute()
    row = measure_row(method, tasks, len(tasks), EvaluationOptions(label_space=PROTOCOLS[protocol]))
    assert len(row) == 2
    assert all(0 <= value <= 100 for entry in row for value in (entry.accuracy, entry.calibration_error))

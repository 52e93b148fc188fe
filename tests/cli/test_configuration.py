"""From arguments and YAML to settings: defaults, overrides, switching the method, every mistake at once."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from cl_methods.commands.configuration import ConfigurationError, parse
from cl_methods.methods import METHODS
from cl_methods.training.config import differences


def settings(*arguments: str):
    return parse(arguments, "")[0]


@pytest.fixture
def config_file(tmp_path):
    def write(content) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def test_defaults_are_those_of_method_and_scenario():
    config = settings()
    assert (config.scenario, config.model, config.pretrained, config.seed) == ("mini", "mini", None, 0)
    assert config.settings == METHODS[config.method].default_config("mini")
    zscl = settings("--method", "zscl")
    assert zscl.settings == METHODS["zscl"].default_config("mini")
    folders = settings("--scenario", "folders", "--method=zscl")
    assert (folders.model, folders.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert folders.settings == METHODS["zscl"].default_config("folders")


def test_options_override_the_file_and_the_file_overrides_defaults(config_file):
    path = config_file({"method": {"name": "finetune", "lr": 0.25, "iterations": 7}, "seed": 4, "workers": 1})
    config = settings("--config", path, "--method.lr", "3e-4", "--workers", "0")
    assert (config.method, config.settings.lr, config.settings.iterations) == ("finetune", 3e-4, 7)
    assert (config.seed, config.workers) == (4, 0)
    assert config.settings.warmup == METHODS["finetune"].default_config("mini").warmup


def test_sections_of_a_method_are_overridden_key_by_key(config_file):
    default = settings("--method", "moe_adapters").settings
    path = config_file({"method": {"name": "moe_adapters", "ddas": {"threshold": 7.5}}})
    changed = settings("--config", path).settings
    assert changed.ddas.threshold == 7.5
    assert changed == dataclasses.replace(default, ddas=dataclasses.replace(default.ddas, threshold=7.5))
    with pytest.raises(
        ConfigurationError, match=r"unknown setting method\.ddas\.treshold, did you mean method\.ddas\.thres"
    ):
        settings("--config", config_file({"method": {"name": "moe_adapters", "ddas": {"treshold": 7.5}}}))


def test_exponents_without_a_dot_are_numbers(config_file):
    assert settings("--config", config_file("method: {name: finetune, lr: 3e-4}")).settings.lr == 3e-4


def test_naming_another_method_resets_to_its_defaults(config_file):
    path = config_file({"method": {"name": "finetune", "lr": 0.25}, "seed": 4})
    config = settings("--config", path, "--method", "zscl")
    assert config.settings == METHODS["zscl"].default_config("mini")
    assert config.seed == 4


def test_a_saved_configuration_gives_the_same_run(config_file):
    config = settings("--method", "zscl", "--method.lr", "0.5", "--seed", "3", "--evaluation.split", "validation")
    again = settings("--config", config_file(config.as_dict()))
    assert differences(config.as_dict(), again.as_dict()) == []
    assert again == config


def test_all_mistakes_in_a_file_are_told_at_once(config_file):
    path = config_file(
        {
            "method": {"name": "finetune", "lrr": 1, "iterations": "many"},
            "sead": 1,
            "evaluation": {"label_space": "task-wise"},
            "checkpoint": {"evry": 3},
        }
    )
    with pytest.raises(ConfigurationError) as caught:
        settings("--config", path)
    text = str(caught.value)
    assert "unknown setting method.lrr, did you mean method.lr?" in text
    assert "unknown setting sead, did you mean seed?" in text
    assert "unknown setting checkpoint.evry, did you mean checkpoint.every?" in text
    assert "method.iterations: Input should be a valid integer" in text
    assert "evaluation.label_space: Input should be 'task', 'seen' or 'all', got 'task-wise'" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "must hold `name: value` lines, not a list"),
        ("a: [1", "not valid YAML"),
        ("method: zsl", "did you mean zscl"),
        ("scenario: mimi", "did you mean mini"),
        ("method: {name: finetune, lr: -1}", "lr: expected a number > 0, got -1"),
        ("limit_tasks: 0", "limit_tasks: expected a number >= 1, got 0"),
    ],
)
def test_files_that_cannot_be_used(config_file, content, message):
    with pytest.raises(ConfigurationError, match=message):
        settings("--config", config_file(content))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml does not exist"):
        settings("--config", "nowhere.yaml")


def test_a_misspelt_option_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as caught:
        settings("--method", "finetune", "--method.lrr", "3")
    assert caught.value.code == 2
    assert "--method.lr FLOAT" in capsys.readouterr().err


def test_help_shows_effective_defaults_and_examples(capsys, config_file):
    path = config_file({"method": {"name": "finetune", "lr": 0.125}})
    with pytest.raises(SystemExit) as caught:
        parse(["--config", path, "--help"], "Train.\n\nexamples:\n  clk run")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "(default: 0.125)" in text
    assert "clk run" in text

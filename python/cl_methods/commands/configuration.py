"""From command line and YAML file to a :class:`~cl_methods.training.config.RunConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from cl_methods.evaluation.accuracy import LabelSpace
from cl_methods.methods import METHODS, Method
from cl_methods.methods.find import find_method, named_in_data
from cl_methods.scenarios import SCENARIOS, ScenarioOptions, xtail
from cl_methods.training.config import RunConfig
from cl_methods.training.starting_point import decided_by

DEFAULT_METHOD = "moe_adapters"
DEFAULT_MODELS = {"mini": ("mini", None)}
"""Model and weights of scenarios that bring their own; the others take OpenAI's ViT-B/16."""

DEFAULT_LABEL_SPACES: dict[str, LabelSpace] = {"cil": "seen", "xtail": "all"}
"""Label spaces of scenarios whose protocol is not to know the task."""

DEFAULT_DATA: dict[str, dict[str, Any]] = {"xtail": {"split": xtail.SPLIT, "shots": xtail.SHOTS}}
"""Data of scenarios whose protocol has one form."""


class ConfigurationError(ValueError):
    """Settings that do not fit; the message lists every one of them."""


@dataclasses.dataclass
class Invocation:
    """How ``clk run`` was called, besides the configuration.

    Attributes:
        config: YAML file with settings; options on the command line override it.
        output: directory of the run; by default a fresh `runs/SCENARIO-METHOD-seedN`.
        resume: continue the run in the output directory.
        overwrite: replace the run in the output directory.
        dry_run: say what would be done, and stop.
    """

    config: Path | None = None
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False


def parse(
    arguments: Sequence[str],
    description: str,
    prog: str = "clk run",
    *,
    file: Mapping[str, Any] | None = None,
    file_name: Path | None = None,
) -> tuple[RunConfig, Invocation]:
    """Read ``clk run``'s arguments, or those of another verb that takes the same.

    Defaults depend on method and scenario, so these and ``--config`` are looked up first: naming another method than the
    file does drops the file's method settings. Then the file is validated, then tyro reads the whole line.

    Args:
        arguments: after the verb.
        description: for ``--help``.
        prog: the verb.
        file: settings that hold where the arguments give no others, in place of ``--config``.
        file_name: where they stand, for messages.

    Raises:
        ConfigurationError: unknown or wrong settings in the file, or an unknown method or scenario.
        SystemExit: tyro's: status 2 after a wrong option, 0 after ``--help``.
    """
    path = option_given(arguments, "--config") if file is None else str(file_name)
    if file is None:
        file = read_yaml(Path(path)) if path is not None else {}
    from_file = file.get("method", {})
    from_file = {"name": from_file} if isinstance(from_file, str) else dict(from_file)
    method = option_given(arguments, "--method")
    weights = option_given(arguments, "--weights") or file.get("weights")
    start: dict[str, Any] = {}
    if weights is not None:
        start = decided_by(Path(weights), method or from_file.get("name"))
        learnt = dict(start.pop("method", {}))
        if "name" in learnt:
            method = _method_of(method, learnt.pop("name"), str(weights))
            from_file = {**learnt, **from_file, "name": method}
    if method is None:
        method = from_file.get("name", DEFAULT_METHOD)
        _method_type(method, path)
    else:
        _method_type(method)
    scenario = _known("scenario", option_given(arguments, "--scenario") or file.get("scenario", "mini"), SCENARIOS)
    if from_file.pop("name", method) != method:
        from_file = {}
    given = {**start, **file, "method": from_file}
    if start:
        given |= {"weights": start["weights"]}
    model = option_given(arguments, "--model")
    if start and start["weights"] is None and model is not None:
        raise ConfigurationError(f"model: {weights} brings its own; leave out --model {model}")
    if model is not None and model != file.get("model"):
        given |= {"model": model, "pretrained": None}  # other weights than the default model's; --pretrained names them
    shots = option_given(arguments, "--data.shots")
    if shots is not None:  # few-shot runs have settings of their own
        given |= {"data": {**(file.get("data") or {}), "shots": None if shots == "None" else shots}}
    default = validated(method, scenario, given)
    values = {entry.name: getattr(default, entry.name) for entry in dataclasses.fields(RunConfig)}
    command_type = _command_type(type(default.settings), method)
    command = tyro.cli(
        command_type,
        default=command_type(**values),
        args=list(arguments),
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )
    config = RunConfig(**{entry.name: getattr(command, entry.name) for entry in dataclasses.fields(RunConfig)})
    if start:  # an exported model is the run's model, and no starting point besides
        config.weights = Path(start["weights"]) if start["weights"] is not None else None
    rest = {entry.name: getattr(command, entry.name) for entry in dataclasses.fields(Invocation)}
    return config, Invocation(**rest)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigurationError: the file does not exist, is not YAML, or does not hold a mapping.
    """
    if not path.is_file():
        raise ConfigurationError(f"config: {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"config: {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"config: {path} must hold `name: value` lines, not a {type(content).__name__}")
    return content


def validated(method: str, scenario: str, given: Mapping[str, Any]) -> RunConfig:
    """The defaults of a method on a scenario, overridden by ``given`` as a YAML file holds it.

    Raises:
        ConfigurationError: all unknown keys (with the closest known one) and all values of the wrong type at once.
    """
    method_type = _method_type(method)
    settings_type = method_type.Config
    settings = method_type.default_config(_protocol(scenario, given))
    model, pretrained = DEFAULT_MODELS.get(scenario, ("ViT-B-16-quickgelu", "openai"))
    default = RunConfig(method=method, settings=settings, scenario=scenario, model=model, pretrained=pretrained)
    default.evaluation.label_space = DEFAULT_LABEL_SPACES.get(scenario, default.evaluation.label_space)
    default.data = dataclasses.replace(default.data, **DEFAULT_DATA.get(scenario, {}))
    if "model" in given and "pretrained" not in given:
        default.pretrained = None
    known = {**default.as_dict(), "method": dataclasses.asdict(settings)}
    problems = _unknown_keys(known, given, "")
    values = _merged(known, given)
    merged_settings = values.pop("method")
    try:
        settings = TypeAdapter(settings_type).validate_python(merged_settings)
    except ValidationError as error:
        problems += _messages(error, "method.")
    try:
        config = TypeAdapter(RunConfig).validate_python({**values, "method": method, "settings": settings})
    except ValidationError as error:
        problems += _messages(error, "")
    if problems:
        raise ConfigurationError("config: " + "; ".join(problems))
    return config


def _protocol(scenario: str, given: Mapping[str, Any]) -> str:
    """The section of settings for a scenario: few-shot runs have one of their own."""
    data = given.get("data")
    usual = DEFAULT_DATA.get(scenario, {}).get("shots")
    shots = data.get("shots", usual) if isinstance(data, Mapping) else usual
    return ScenarioOptions(shots=shots).protocol(scenario)


def _method_type(name: str, file: str | None = None) -> type[Method]:
    """The method that a command line asks for, or that ``file`` names."""
    try:
        return find_method(name) if file is None else named_in_data(name, file)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _method_of(asked: str | None, learnt: str, weights: str) -> str:
    """The method of a run that goes on from another: the one that was asked for, which is the same, or the other's own."""
    if asked is None:
        _method_type(learnt, weights)
    return asked or learnt


def _command_type(settings_type: type, method: str) -> type:
    """RunConfig and Invocation as one dataclass whose ``--method.*`` options are those of the chosen method."""
    hints = get_type_hints(RunConfig)
    hints["method"] = Literal[(*METHODS, *({method} - METHODS.keys()))]  # type: ignore[valid-type]
    hints["scenario"] = Literal[tuple(SCENARIOS)]  # type: ignore[valid-type]
    hints["settings"] = Annotated[settings_type, tyro.conf.arg(name="method")]
    fields: list[Any] = []
    for entry in dataclasses.fields(RunConfig):
        fields.append((entry.name, hints[entry.name]))
    invocation = get_type_hints(Invocation)
    for entry in dataclasses.fields(Invocation):
        kind = tyro.conf.FlagCreatePairsOff[bool] if invocation[entry.name] is bool else invocation[entry.name]
        fields.append((entry.name, kind, dataclasses.field(default=entry.default)))
    made = dataclasses.make_dataclass("Run", fields)
    attributes = [(kind.__doc__ or "").split("Attributes:", 1)[1].rstrip() for kind in (RunConfig, Invocation)]
    made.__doc__ = "Run.\n\n    Attributes:" + "".join(attributes) + "\n"
    return made


def option_given(arguments: Sequence[str], option: str) -> str | None:
    """The last value given to ``option``, as ``--x value`` or ``--x=value``, before the whole line is read."""
    found = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            found = arguments[position + 1]
        elif argument.startswith(f"{option}="):
            found = argument.split("=", 1)[1]
    return found


def _known(what: str, name: Any, known: Mapping[str, Any]) -> str:
    if name not in known:
        close = get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigurationError(f"{what}: expected one of {', '.join(known)}, got {name!r}{hint}")
    return name


def _unknown_keys(known: Mapping[str, Any], given: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for key, value in given.items():
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f", did you mean {prefix}{close[0]}?" if close else ""
            problems.append(f"unknown setting {prefix}{key}{hint}")
        elif isinstance(known[key], dict) and known[key] and isinstance(value, Mapping):
            problems += _unknown_keys(known[key], value, f"{prefix}{key}.")
    return problems


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults`` overridden by what is known of ``given``, sections key by key."""
    result = dict(defaults)
    for key, value in given.items():
        if key in result:
            section = isinstance(result[key], dict) and result[key] and isinstance(value, Mapping)
            result[key] = _merged(result[key], value) if section else value
    return result


def _messages(error: ValidationError, prefix: str) -> list[str]:
    messages: dict[str, str] = {}
    for problem in error.errors():
        # of a union every member complains, each under a location of its own; the first says what is expected
        where = prefix + ".".join(str(part) for part in problem["loc"] if "[" not in str(part))
        text = problem["msg"].removeprefix("Value error, ")
        message = f"{where.rstrip('.')}: {text}, got {problem['input']!r}" if problem["loc"] else f"{prefix}{text}"
        messages.setdefault(where if problem["loc"] else message, message)
    return list(messages.values())

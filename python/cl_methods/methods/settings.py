"""Settings per scenario, from the YAML file that every method ships in ``cl_methods/configs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

FILES = files("cl_methods") / "configs"
"""One file per method, ``NAME.yaml``, with a section per scenario that holds what differs from the dataclass's defaults."""


@cache
def _sections(method: str) -> Mapping[str, Mapping[str, Any]]:
    if not (FILES / f"{method}.yaml").is_file():
        return {}
    content = yaml.safe_load((FILES / f"{method}.yaml").read_text(encoding="utf-8")) or {}
    return {scenario: values or {} for scenario, values in content.items() if not scenario.startswith("_")}


def scenario_settings(method: str, scenario: str) -> Mapping[str, Any]:
    """What the method's file says of ``scenario``; nothing for a scenario without a section, or a method without a file.

    Args:
        method: a method's name. Sections whose names begin with an underscore only hold values that others refer to.
        scenario: a scenario's name, or ``mtil_few_shot`` or ``cil`` for the protocols of these names.
    """
    return _sections(method).get(scenario, {})


def build_settings(settings_type: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass ``settings_type`` with ``values``, nested dataclasses from nested mappings.

    Raises:
        ValueError: a setting does not exist or has a wrong value.
    """
    _check_names(settings_type, values, "")
    try:
        return TypeAdapter(settings_type).validate_python(dict(values))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()]
        raise ValueError(f"{settings_type.__name__}: {'; '.join(problems)}") from error


def _check_names(settings_type: Any, values: Mapping[str, Any], prefix: str) -> None:
    hints = get_type_hints(settings_type)
    known = {entry.name for entry in fields(settings_type)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{settings_type.__name__}: no setting {prefix}{name}; known are {', '.join(sorted(known))}"
            )
        if is_dataclass(hints[name]) and isinstance(value, Mapping):
            _check_names(hints[name], value, f"{prefix}{name}.")

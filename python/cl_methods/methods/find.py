"""Methods by name, those of the package and those of whoever uses it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_methods.methods import METHODS
from cl_methods.methods.base import Method

_REQUESTED: set[str] = set()
"""Names by which somebody has asked for a class of their own, in this process."""


def named_in_data(name: str, file: Path | str) -> type[Method]:
    """The method that a file names: one of this package, or a class that has been asked for by name before.

    Files are data. Which code is run is decided by who calls :func:`find_method`, or by ``--method`` on a command line.

    Args:
        name: as for :func:`find_method`.
        file: where the name stands, for the message.

    Raises:
        ValueError: it names code that nobody has asked for, or see :func:`find_method`.
    """
    if isinstance(name, str) and ":" in name and name not in _REQUESTED:
        raise ValueError(
            f"method: {file} names code, {name!r}, which a file may not have run; "
            f"if you trust it, ask for it yourself with --method {name} (find_method({name!r}) in Python)"
        )
    return find_method(name)


def find_method(name: str) -> type[Method]:
    """A method of this package by its name, or one of your own as ``MODULE:CLASS`` or ``PATH.py:CLASS``.

    Naming a class of your own runs the file or module that it is in.

    Args:
        name: ``"zscl"``, ``"my_package.my_method:MyMethod"``, ``"experiments/my_method.py:MyMethod"``.

    Raises:
        ValueError: no such method, file, module or class; the class is no :class:`Method`, is not complete, or has the name
            of a method of this package.
    """
    if name in METHODS:
        return METHODS[name]
    place, colon, class_name = name.rpartition(":")
    if not colon:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; one of your own is MODULE:CLASS or PATH.py:CLASS"
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    _REQUESTED.add(name)
    found: Any = getattr(_module(place, name), class_name, None)
    if found is None:
        raise ValueError(f"method: {place} has no class {class_name!r}")
    if not isinstance(found, type) or not issubclass(found, Method):
        raise ValueError(f"method: {name} is no subclass of cl_methods.methods.Method")
    missing = [part for part in ("name", "facts", "Config") if not hasattr(found, part)]
    missing += sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"method: {name} lacks {', '.join(missing)}")
    if found.name in METHODS and found is not METHODS[found.name]:
        raise ValueError(f"method: {name} has the name {found.name!r} of another method")
    return found


def _module(place: str, name: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"method: cannot import {place!r} for {name!r}: {error}") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"method: {place} does not exist")
    unique = f"cl_methods_file_{path.stem}_{abs(hash(path))}"
    if unique not in sys.modules:
        specification = importlib.util.spec_from_file_location(unique, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[unique] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
    return sys.modules[unique]

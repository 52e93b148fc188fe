"""The ``clk`` command: verbs, each in a module of its own."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches

from cl_methods.text import printable

COMMANDS = {
    "run": "train and evaluate a method over a whole task sequence",
    "plan": "hours, memory and limits of a run on GPUs that are not at hand: predicted",
    "evaluate": "a run's checkpoints in other label spaces and scopes, or on other data",
    "compare": "one table, figures and an HTML page over several runs",
    "export": "trained weights as files that open_clip, this package or public code loads",
    "data": "which datasets are there, and what is missing where",
    "profile": "what a method costs over the frozen model, layer by layer",
    "methods": "list methods and scenarios",
    "bench": "what steps, evaluations and kernels cost, beside their peers and over time",
    "doctor": "versions, devices, and which backend runs each operation and why",
}
"""Verb -> what it does; the code is in ``cl_methods.commands.<verb>``."""

SPINS = "10000"
"""How often a thread of OpenMP looks for new work before it sleeps. libgomp's own 300,000, a millisecond, keep a core from
whoever needs it: beside two busy programs steps of a small model took twenty times as long as with a hundred. Fewer than
this cost an idle machine more than they are worth: 8 % here, a third with 1,000."""

EXPECTED_ERRORS = (ValueError, RuntimeError, OSError, ImportError)
"""What a wrong setting, damaged data or a missing file raises; shown as one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``clk`` with the given arguments (default: the process').

    Returns:
        0 on success, 2 after an error that the message explains, 130 if stopped by Ctrl-C, 143 by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    verb = arguments.pop(0)
    if verb not in COMMANDS:
        close = get_close_matches(verb, COMMANDS, n=1)
        hint = f"; did you mean `clk {close[0]}`?" if close else ""
        print(f"clk: error: no command {verb!r}{hint} (there are: {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded, by the verb's module
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    formatted = warnings.formatwarning
    if not debug:
        warnings.formatwarning = _one_line
    try:
        return importlib.import_module(f"cl_methods.commands.{verb}").main(arguments)
    except EXPECTED_ERRORS as error:
        if debug:
            raise
        text = printable(" ".join(str(error).split())) or type(error).__name__
        with suppress(OSError):  # a full disk may be that of the log too
            print(f"clk {verb}: error: {text} (--debug shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"clk {verb}: stopped", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = formatted


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as its users read it; --debug shows where it comes from."""
    return f"warning: {' '.join(str(message).split())}\n"


def _usage() -> str:
    lines = "\n".join(f"  {verb:<10}{text}" for verb, text in COMMANDS.items())
    return (
        "usage: clk COMMAND [options]\n\n"
        f"Continual learning of CLIP.\n\ncommands:\n{lines}\n\n"
        "examples:\n"
        "  clk run                                    a default method on the embedded offline scenario, in minutes\n"
        "  clk run --method zscl --seed 1 --output runs/zscl\n"
        "  clk compare runs/* --output report\n"
        "  clk COMMAND --help                         options and examples of a command"
    )


if __name__ == "__main__":
    sys.exit(main())

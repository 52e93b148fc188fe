"""Programs in processes of their own that start in milliseconds: children of one process that has imported what takes seconds.

``run`` is ``subprocess.run`` for them. The programs, their arguments, environments, signals, exit statuses and deaths are those of
any process; what they cannot have is an environment that is read while the preloaded modules are imported, or while the
interpreter starts (``TRITON_INTERPRET``, ``OMP_NUM_THREADS``, ``PYTHON…``).

usage, by :class:`Forkserver` alone: forked.py MODULE …     requests and replies are lines of JSON
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Forkserver:
    """One process with some modules imported, which forks for every program that it is asked to run.

    Args:
        modules: what it imports before the first program runs; nothing else is shared by the programs.
        environment: what differs from that of the tests.
    """

    def __init__(self, modules: Sequence[str], **environment: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python"))), **environment}
        self._modules = tuple(modules)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def run(
        self,
        program: Path | str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """``python PROGRAM ARGUMENTS``, captured, in a session of its own.

        Args:
            program: a file.
            arguments: its arguments; what is no text is made one.
            environment: what differs from that of the tests; the paths of ``PYTHONPATH`` come before the server's.
            folder: working directory; by default the tests'.
            timeout: seconds after which the program and all its children are killed.

        Raises:
            subprocess.TimeoutExpired: it was killed.
            RuntimeError: the server is gone.
        """
        with tempfile.TemporaryDirectory() as place:
            streams = [Path(place) / name for name in ("stdout", "stderr")]
            request = {
                "program": str(program),
                "arguments": [str(argument) for argument in arguments],
                "environment": {**os.environ, **(environment or {})},
                "folder": str(folder or Path.cwd()),
                "streams": [str(stream) for stream in streams],
            }
            self._send(request)
            child = self._reply(None)
            try:
                status = self._reply(timeout)
            except TimeoutError:
                os.killpg(child, signal.SIGKILL)
                self._reply(None)
                raise subprocess.TimeoutExpired([str(program), *request["arguments"]], timeout) from None
            texts = [stream.read_text(errors="replace") for stream in streams]
        return subprocess.CompletedProcess([str(program), *request["arguments"]], status, *texts)

    def close(self) -> None:
        """End the server."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"the process that imports {', '.join(self._modules)} is gone, see its error") from error

    def _reply(self, timeout: float | None) -> int:
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that imports {', '.join(self._modules)} is gone, see its error")
        return json.loads(line)


def serve(modules: Sequence[str]) -> None:
    """Answer requests until there are no more: first with the id of the child, then with its status."""
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            become(request)  # and leave as a process of its own leaves: the interpreter ends, exit handlers run
            return
        print(child, flush=True)
        print(wait(child), flush=True)


def wait(child: int) -> int:
    """The exit status of a child; if whoever asks for it is gone, the child is killed with all of its own, and this ends."""
    end = os.pidfd_open(child)
    poller = select.poll()
    poller.register(end, select.POLLIN)
    poller.register(sys.stdin, 0)  # that it was closed: which is reported unasked
    gone = all(place != end for place, _ in poller.poll())
    os.close(end)
    if gone:
        os.killpg(child, signal.SIGKILL)
        sys.exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def become(request: dict[str, Any]) -> None:
    """Run the program in this child as ``python PROGRAM ARGUMENTS`` would."""
    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    nothing = os.open(os.devnull, os.O_RDONLY)
    for place, stream in enumerate([nothing, *(os.open(name, flags) for name in request["streams"])]):
        os.dup2(stream, place)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    program = request["program"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(program).parent), *filter(None, paths)]
    sys.argv = [program, *request["arguments"]]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])

"""What may import what: read from the sources, and from what a fresh process has loaded."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cl_kernels

KERNELS = Path(cl_kernels.__file__).parent
ROOT = Path(__file__).parents[1]
METHODS = ROOT / "python" / "cl_methods"
ROOMS = (
    "cli", "commands", "bench", "forecast", "profiling", "training", "evaluation", "methods", "components", "backbone",
    "scenarios", "datasets", "weights", "sharding", "ranks",
)  # fmt: skip
"""From the top floor down; :func:`test_rooms_import_downwards`."""
OPERATIONS = sorted(path.parent.name for path in KERNELS.glob("*/reference.py"))


@cache
def imported(path: Path, package: str) -> set[str]:
    """Every module that a file names in an import, at any depth of nesting; ``from a import b`` counts as ``a.b`` too."""
    parts = path.relative_to(KERNELS.parent if package == "cl_kernels" else METHODS.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: -node.level], *filter(None, [node.module])]) if node.level else node.module
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def module_name(path: Path) -> str:
    """As it is imported; that of a package for its ``__init__``."""
    package = KERNELS if path.is_relative_to(KERNELS) else METHODS
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files, folder
    return files


def roots(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_kernels_need_torch_alone():
    allowed = {"torch", "triton", "cl_kernels"} | set(sys.stdlib_module_names)
    for path in sources(KERNELS):
        assert roots(imported(path, "cl_kernels")) <= allowed, path


def test_triton_is_imported_by_its_kernels_only():
    for path in sources(KERNELS):
        if path.name.startswith("triton_") or path == KERNELS / "testing.py":
            continue
        assert "triton" not in roots(imported(path, "cl_kernels")), path


def test_operations_do_not_import_each_other():
    assert {"moe_adapter", "distill_kl", "gating", "weight_average"} <= set(OPERATIONS)
    for operation in OPERATIONS:
        others = tuple(f"cl_kernels.{other}" for other in OPERATIONS if other != operation)
        for path in sources(KERNELS / operation):
            crossing = {m for m in imported(path, "cl_kernels") if m.startswith(others)}
            assert not crossing, (path, crossing)


def test_shared_modules_do_not_import_operations():
    """dispatch, library and schemas serve the operations: a circle would start here."""
    operations = tuple(f"cl_kernels.{operation}" for operation in OPERATIONS)
    for name in ("dispatch", "library", "schemas"):
        assert not {m for m in imported(KERNELS / f"{name}.py", "cl_kernels") if m.startswith(operations)}


def test_rooms_import_downwards():
    """Every room of the methods knows those below it alone, also inside functions; what is in no room, none of them."""
    floors = {room: floor for floor, room in enumerate(ROOMS)}
    assert {path.parent.name for path in METHODS.glob("*/*.py")} - floors.keys() <= {"configs"}
    for path in sources(METHODS):
        own = path.relative_to(METHODS).with_suffix("").parts[0]
        for module in imported(path, "cl_methods"):
            room = module.split(".")[1] if module.startswith("cl_methods.") else own
            assert room == own or floors.get(room, len(ROOMS)) > floors.get(own, len(ROOMS) - 1), (path, module)


def test_files_do_not_import_each_other_in_circles():
    """Packages that hand on what their files define are no circle."""
    files = {module_name(path): path for package in (KERNELS, METHODS) for path in sources(package)}
    graph = {
        name: {
            module
            for module in imported(path, name.partition(".")[0])
            if module in files and module != name and not name.startswith(f"{module}.")
        }
        for name, path in files.items()
    }
    assert sum(map(len, graph.values())) > len(files)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("room", "known"),
    [
        # what a run leaves on disk knows nothing of how it came about but the rows that it holds
        ("checkpoints", ("checkpoints", "rows")),
        # what leaves a run is read from its directory
        ("export", ("export", "checkpoints")),
        # counted and planned from the configuration and from single tasks, never from a run under way
        ("planning", ("planning", "building", "config", "data")),
        ("memory", ("memory", "planning", "config", "gradients", "sizes", "task")),
    ],
)
def test_rooms_of_training_know_no_run(room, known):
    allowed = tuple(f"cl_methods.training.{name}" for name in known)
    for path in sources(METHODS / "training" / room):
        inside = {m for m in imported(path, "cl_methods") if m.startswith("cl_methods.training.")}
        assert all(module.startswith(allowed) for module in inside), (path, inside)


def test_open_clip_is_imported_in_one_place_behind_what_prepares_torchvision():
    """Without its operators torchvision, which open_clip imports, cannot load; and it takes longer than most commands."""
    for path in sources(METHODS):
        tree = ast.parse(path.read_text())
        for node in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
            if ast.unparse(node.test) == "TYPE_CHECKING":
                node.body.clear()
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "open_clip" not in roots(names), path
    lazy = (METHODS / "lazy_open_clip.py").read_text()
    assert "\nprepare_torchvision()\n" in lazy
    assert lazy.count("import_module(") == 1


def test_commands_that_need_no_model_do_not_load_what_models_need(tmp_path, forked_torch):
    """Every ``--help``, and commands that look at files and settings alone: neither open_clip nor torch's compiler."""
    program = tmp_path / "program.py"
    program.write_text(
        "import contextlib, io, json, sys\n"
        "from cl_methods.cli import COMMANDS, main\n"
        "before = set(sys.modules)\n"
        "found = {}\n"
        "def run(*arguments):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        "    heavy = {'matplotlib', 'open_clip', 'torchvision', 'timm', 'torch._dynamo'} & set(sys.modules)\n"
        "    found[' '.join(arguments)] = sorted(heavy)\n"
        "for verb in COMMANDS:\n"
        "    run(verb, '--help')\n"
        "run('methods')\n"
        "run('data', 'check', '--root', sys.argv[1])\n"
        "run('compare', sys.argv[1])\n"
        "run('run', '--method', 'zsl')\n"
        "print(json.dumps(found))\n"
    )
    done = forked_torch.run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("run --help") == []
    assert {call: heavy for call, heavy in found.items() if heavy} == {}


def test_importing_the_kernels_loads_nothing_else():
    """Beyond what torch itself loads: neither Triton, NumPy nor open_clip, nor torch's compiler."""
    code = (
        "import sys, json, torch; before = set(sys.modules); import cl_kernels, cl_kernels.nn, cl_kernels.doctor;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, compiler = done.stdout.strip().rsplit(" ", 1)
    assert set(json.loads(added)) <= {"cl_kernels", "torch"} | set(sys.stdlib_module_names)
    assert compiler == "False"

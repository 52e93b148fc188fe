"""What may import what: read from the sources, and from what a fresh process has loaded."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cl_kernels

KERNELS = Path(cl_kernels.__file__).parent
ROOT = Path(__file__).parents[1]
METHODS = ROOT / "python" / "cl_methods"
OPERATIONS = sorted(path.parent.name for path in KERNELS.glob("*/reference.py"))


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


def test_components_know_nothing_above():
    above = tuple(f"cl_methods.{name}" for name in ("cli", "commands", "evaluation"))
    for path in sources(METHODS / "components"):
        assert not {m for m in imported(path, "cl_methods") if m.startswith(above)}, path


def test_datasets_and_components_know_no_scenario():
    """A scenario arranges tasks; what a task is made of must not know how it is arranged."""
    above = tuple(f"cl_methods.{name}" for name in ("scenarios", "methods", "training"))
    for path in [*sources(METHODS / "datasets"), *sources(METHODS / "components")]:
        assert not {m for m in imported(path, "cl_methods") if m.startswith(above)}, path


@pytest.mark.parametrize("package", ["methods", "datasets", "scenarios"])
def test_methods_and_data_do_not_import_the_command_line_or_evaluation(package):
    above = tuple(f"cl_methods.{name}" for name in ("cli", "commands", "evaluation"))
    for path in sources(METHODS / package):
        assert not {m for m in imported(path, "cl_methods") if m.startswith(above)}, path


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
        "    heavy = {'open_clip', 'torchvision', 'timm', 'torch._dynamo'} & set(sys.modules)\n"
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

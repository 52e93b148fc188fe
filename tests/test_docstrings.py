"""The rule for public docstrings, checked on the sources.

Public is every function, class and method without a leading underscore, in every module but these: files beside the ``__init__`` of
an operation (its implementations, described there) or of the scenario ``mini`` (how that world is made), and modules with a leading
underscore. Each needs a docstring, except methods that override a documented one of a base class in the same package. And:

1. A parameter annotated as ``Tensor`` (alone, optional or in a container, but not by name as in a state dict) must be named in the
   docstring (for ``__init__`` and methods, that of the class counts too), and the docstring must hold a shape such as ``(B, L, D)``
   or ``(N,)``, or say "scalar", "any shape", "same shape" or "shape of".
2. A body that raises must have a ``Raises:`` section that names each exception type it raises by name.
3. What implements a published operation or method (the functions that ``cl_kernels`` exports and take tensors, the modules of
   ``cl_kernels.nn``, and every subclass of ``Method``) must have a line ``Source:`` with a year; a method made up for
   comparison says "not a continual method" instead.

``test_the_rule_can_fail`` holds the rule against sources that break it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cl_kernels

ROOT = Path(__file__).parents[1]
KERNELS, METHODS = ROOT / "cl_kernels", ROOT / "python" / "cl_methods"
SHAPE = re.compile(
    r"\((?:…, ?)?[A-Z0-9][\w+·|]*(?:, ?[\w+ ·|]+)*,?\)|\bscalars?\b|\b0-d\b|any shape|same shapes?|shapes? of"
)
TENSOR = re.compile(r"\b(?:Long|Float)?Tensor\b")
YEAR = re.compile(r"Source:[^\n]*(?:\n[^\n]+)*?\b(?:19|20)\d\d\b")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Public definitions of a module and its public classes, with the class they belong to."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node, None
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Definition) and (not inner.name.startswith("_") or inner.name == "__init__"):
                        yield inner, node


def is_kernel(node: Definition) -> bool:
    """Triton kernels carry shapes in the comments of their arguments."""
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def raised(node: Definition) -> set[str]:
    """Names of exceptions that the body raises itself; re-raising and helpers do not count."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and inner.exc is not None:
            target = inner.exc.func if isinstance(inner.exc, ast.Call) else inner.exc
            if isinstance(target, ast.Name) and target.id[:1].isupper():
                found.add(target.id)
    return found


def takes_tensor(annotation: str) -> bool:
    """Tensors by name, as in a state dict, have the shapes of what they are named after."""
    return bool(TENSOR.search(annotation)) and "str, " not in annotation


def violations(source: str) -> list[str]:
    """What rules 1 and 2 and the presence of docstrings find in one module."""
    problems = []
    tree = ast.parse(source)
    if not ast.get_docstring(tree) and tree.body:
        problems.append("module: no docstring")
    for node, owner in public(tree):
        name = f"{owner.name}.{node.name}" if owner else node.name
        inherited = (ast.get_docstring(owner) or "") if owner else ""
        own = ast.get_docstring(node) or ""
        text = own + "\n" + inherited
        bases = [ast.unparse(base) for base in owner.bases] if owner else []
        if not own and any(node.name in DOCUMENTED.get(base, set()) for base in bases):
            continue
        if not own and node.name != "__init__":
            problems.append(f"{name}: no docstring")
            continue
        if isinstance(node, ast.ClassDef) or is_kernel(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        tensors = [a.arg for a in arguments if a.annotation is not None and takes_tensor(ast.unparse(a.annotation))]
        delegated = re.search(r"See :(?:func|meth|class):|[Tt]he same", text)
        if tensors and not delegated:
            missing = [a for a in tensors if not re.search(rf"\b{re.escape(a)}\b", text)]
            problems += [f"{name}: tensor argument {a} is not described" for a in missing]
            if not SHAPE.search(text):
                problems.append(f"{name}: takes tensors but names no shape")
        absent = sorted(e for e in raised(node) if "Raises:" not in text or e not in text.partition("Raises:")[2])
        problems += [
            f"{name}: raises {e} but its Raises section does not say so" for e in absent if e != "NotImplementedError"
        ]
    return problems


def modules() -> list[Path]:
    """The files that the rules hold for."""
    inner = [p.parent for p in KERNELS.glob("*/reference.py")] + [METHODS / "scenarios" / "mini"]
    every = [path for folder in (KERNELS, METHODS) for path in sorted(folder.rglob("*.py"))]
    found = [p for p in every if p.name == "__init__.py" or not (p.stem.startswith("_") or p.parent in inner)]
    assert len(found) > 30
    return found


def documented_methods() -> dict[str, set[str]]:
    """{class: its methods with a docstring}, over all modules."""
    found: dict[str, set[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                inner = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
                found[node.name] = {n.name for n in inner if ast.get_docstring(n)}
    return found


DOCUMENTED = documented_methods()


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rules(path):
    assert violations(path.read_text()) == []


def test_exported_operations_name_their_source():
    checked = 0
    for name in cl_kernels.__all__:
        function = getattr(cl_kernels, name)
        annotations = getattr(function, "__annotations__", {})
        if any(TENSOR.search(str(a)) for a in annotations.values()):
            checked += 1
            assert YEAR.search(function.__doc__), name
            assert "Raises:" in function.__doc__, name
            assert re.search(r"float32|fp32", function.__doc__), f"{name} names no dtype"
    assert checked >= 5


def test_modules_and_methods_name_their_source():
    files = [KERNELS / "nn.py", KERNELS / "averager.py"]
    modules_of_nn = [
        node for path in files for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    classes = [
        node
        for path in sorted((METHODS / "methods").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    methods = {"Method"}
    while grown := {c.name for c in classes if any(ast.unparse(b) in methods for b in c.bases)} - methods:
        methods |= grown
    assert {"MoEAdapter", "DistillKL", "WeightAverager"} <= {node.name for node in modules_of_nn}
    assert {"ZeroShot", "FineTune", "ZSCL", "MoEAdapters", "Joint"} <= methods
    for node in [*modules_of_nn, *(c for c in classes if c.name in methods - {"Method"})]:
        text = ast.get_docstring(node) or ""
        assert YEAR.search(text) or "not a continual method" in text, node.name


BROKEN = {
    "def f(x): return x": "no docstring",
    'def f(x: Tensor):\n    """Doubles ``x``."""': "names no shape",
    'def f(x: Tensor, y: list[Tensor]):\n    """Adds to ``x`` (B, D)."""': "tensor argument y is not described",
    'def f(k):\n    """Checks ``k``."""\n    if k:\n        raise ValueError("k")': "raises ValueError",
    'def f(k):\n    """Checks.\n\n    Raises:\n        TypeError: never.\n    """\n    raise ValueError(k)': "raises ValueError",
    'class C:\n    """A thing."""\n    def g(self, x: Tensor | None): \n        """Takes x."""': "names no shape",
}


@pytest.mark.parametrize(("source", "problem"), BROKEN.items())
def test_the_rule_can_fail(source, problem):
    assert any(problem in found for found in violations('"""A module."""\n' + source)), violations(source)


def test_the_rule_accepts_what_is_right():
    good = (
        '"""A module."""\ndef f(x: Tensor):\n    """Halves.\n\n    Args:\n        x: (B, L, D).\n\n    Raises:\n'
        '        ValueError: x is empty.\n    """\n    raise ValueError("x")\n'
    )
    assert violations(good) == []

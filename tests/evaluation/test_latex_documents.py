"""The LaTeX tables as a compiler reads them: a strict reader of the constructs that they use, and, in the slow tests, pdfLaTeX."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from cl_methods.evaluation.latex import SHRUNK, document
from cl_methods.evaluation.report import compare
from cl_methods.evaluation.tables import TextTable
from cl_methods.scenarios.mtil import ORDERS

HOSTILE = r"""50% & more #1_a ^b ~c $x$ {d} \input{e} <f> |g| "h" [i] *j* ± – — … × λ é \\ \verb|k|"""
TOKEN = re.compile(
    r"%[^\n]*\n|\\(?:begin|end)\{[a-z]+\}|\\[A-Za-z]+|\\[&%$#_{}]|\\\\|\$|[{}&]|\s+|[^\\%${}&~^#_<>|\"\s]", re.DOTALL
)
COMMANDS = {
    "centering": 0, "caption": 1, "toprule": 0, "midrule": 0, "bottomrule": 0, "textbf": 1, "pm": 0, "times": 0, "lambda": 0,
    "textbackslash": 1, "textasciitilde": 1, "textasciicircum": 1, "textless": 1, "textgreater": 1, "textbar": 1,
    "textquotedbl": 1, "ldots": 1, "smallskip": 0, "rotatebox": 1,
}  # fmt: skip
MATHS = {r"\pm", r"\times", r"\lambda"}
RULES = {r"\toprule", r"\midrule", r"\bottomrule"}


def read(text: str) -> list[tuple[str, list[int]]]:
    """Column specification and cells of every row for each table, or an ``AssertionError`` where a compiler would stop."""
    tables: list[tuple[str, list[int]]] = []
    stack: list[str] = []
    place, maths, cells, begun = 0, False, 0, False
    text = text.replace(f"{SHRUNK}%\n", "{")
    while place < len(text):
        match = TOKEN.match(text, place)
        assert match, f"{text[place : place + 30]!r} is nothing that LaTeX takes here"
        token, place = match[0], match.end()
        if token.startswith("%") or token.isspace():
            assert not (token.startswith("%") and stack), token
            continue
        if token.startswith((r"\begin", r"\end")):
            name = token[token.index("{") + 1 : -1]
            assert not maths, token
            if token.startswith(r"\end"):
                assert stack.pop() == name, token
                assert name != "tabular" or not begun, "the last row is not ended"
                continue
            stack.append(name)
            if name == "tabular":
                specification = re.compile(r"\{([lr]+)\}").match(text, place)
                assert specification, text[place : place + 20]
                tables.append((specification[1], []))
                place, cells, begun = specification.end(), 0, False
            continue
        inside = stack[-1] if stack else ""
        if token == "{":
            stack.append("{")
        elif token == "}":
            assert stack.pop() == "{", text[place - 30 : place]
        elif token == "$":
            maths = not maths
        elif token in ("&", r"\\"):
            assert (inside, maths) == ("tabular", False), (token, inside)
            cells, begun = cells + 1, token == "&"
            if token == r"\\":
                tables[-1][1].append(cells)
                cells = 0
                assert not re.compile(r"\s*[\[*]").match(text, place), "an argument of the line break"
        else:
            command = re.fullmatch(r"\\([A-Za-z]+)", token)
            if command:
                assert command[1] in COMMANDS, token
                assert maths == (token in MATHS), token
                assert not COMMANDS[command[1]] or text[place : place + 1] == "{", token
            if token in RULES:
                assert (inside, begun, cells) == ("tabular", False, 0), token
                continue
            assert stack, f"{token!r} outside of everything"
            begun = begun or inside == "tabular"
    assert not stack
    assert not maths
    return tables


def hostile_table() -> TextTable:
    columns = ["", HOSTILE, "x" * 200, "*"]
    rows = [[HOSTILE, "1.0", "–", "[h]"], ["[b]", "*", HOSTILE, "2.0 ± 0.1"]]
    return TextTable(HOSTILE, columns, rows, breaks=(1,), emphasised=frozenset({(0, 1), (1, 2)}))


def wide_table() -> TextTable:
    """A method on all datasets of MTIL."""
    rows = [["moe_adapters (method.experts=22)", *["100.0"] * 11], ["zero-shot", *["50.0"] * 11]]
    return TextTable("Last per task", ["method", *ORDERS["I"]], rows)


def test_the_names_of_many_columns_stand_upright() -> None:
    text = document([wide_table(), hostile_table()])
    assert [columns for columns, _ in read(text)] == ["l" + 11 * "r", "lrrr"]
    assert text.count(r"\rotatebox{90}{") == 11
    assert r"method & \rotatebox{90}{Aircraft} & " in text


def test_hostile_names_are_read_as_text() -> None:
    assert read(document([hostile_table()], f"note: {HOSTILE}\nand more")) == [("lrrr", [4, 4, 4])]


@pytest.mark.parametrize(
    "broken",
    [
        "a & b", r"\begin{table} a_b \end{table}", r"\begin{table} { \end{table}", r"\begin{table} \input{x} \end{table}",
        r"\begin{table}\begin{tabular}{lr} a & b \toprule \\ \end{tabular}\end{table}", r"\begin{table} 5$ \end{table}",
        r"\begin{table}\begin{tabular}{lr} a & b \\ [x] \end{tabular}\end{table}", r"\begin{table} \end{tabular}",
        r"\begin{table}\begin{tabular}{lr} a & b \end{tabular}\end{table}",
    ],
)  # fmt: skip
def test_the_reader_can_fail(broken: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        read(broken)


def written(write_result, tmp_path: Path) -> str:
    runs = [
        write_result("a_1 & 50%", method="zscl"),
        write_result("b", method="moe_adapters", scenario="mtil"),
        write_result("c", method="finetune", seed=1),
    ]
    compare(runs, tmp_path / "out", Console(file=io.StringIO()))
    return (tmp_path / "out" / "table.tex").read_text()


def test_every_table_of_a_comparison_has_as_many_cells_as_columns(write_result, tmp_path: Path) -> None:
    tables = read(written(write_result, tmp_path))
    assert len(tables) == 10  # two boards of five
    for columns, rows in tables:
        assert len(rows) >= 2
        assert set(rows) == {len(columns)}


def test_letters_that_pdflatex_does_not_know_are_named() -> None:
    table = TextTable("β", ["", "č"], [["日本", "1"]])
    assert "% needs LuaLaTeX or XeLaTeX and a font that has β 日 本, which pdfLaTeX" in document([table])
    assert "XeLaTeX" not in document([hostile_table()])


@pytest.mark.slow
def test_pdflatex_compiles_them(write_result, tmp_path: Path) -> None:
    assert shutil.which("pdflatex"), "pdflatex with booktabs is needed (Debian: texlive-latex-recommended)"
    (tmp_path / "hostile.tex").write_text(document([hostile_table()], HOSTILE))
    (tmp_path / "table.tex").write_text(written(write_result, tmp_path))
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\usepackage[T1]{fontenc}"
        r"\begin{document}\input{wide}\typeout{WIDE}\input{table}\clearpage\input{hostile}\end{document}"
    )
    (tmp_path / "wide.tex").write_text(document([wide_table()]))
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, errors="replace"
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000

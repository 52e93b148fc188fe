"""Tables for papers: LaTeX with the rules of the package ``booktabs``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cl_methods.evaluation.tables import TextTable

_SYMBOLS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "–": "--", "—": "---", "…": r"\ldots{}", "×": r"$\times$",
    "λ": r"$\lambda$", "[": "{[}", "]": "{]}", "*": "{*}",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
}  # fmt: skip
SHRUNK = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{"
"""Before a box: it is made smaller where it is wider than the text, and left as it is otherwise."""
_LEVEL = 8
"""Columns with names beside each other; those of more, as in a table with all datasets of MTIL, stand upright."""
_LATIN = 0x17F
"""pdfLaTeX with the encoding T1 knows the letters up to here."""
_TRANSLATION = str.maketrans(_SYMBOLS)


def escape(text: str) -> str:
    """The text as LaTeX prints it: no character of it is a command, and none is an argument of the line break before it."""
    return " ".join(text.translate(_TRANSLATION).split())


def latex(table: TextTable) -> str:
    """A ``table`` environment with the table's title as its caption, best cells bold."""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escape(table.title)}}}",
        r"  \smallskip",
        f"  {SHRUNK}%",
        rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"    \toprule",
        _line(table.columns, level=len(table.columns) <= _LEVEL),
        r"    \midrule",
    ]
    for number, row in enumerate(table.rows):
        if number and number in table.breaks:
            lines.append(r"    \midrule")
        lines.append(_line(row, {column for line, column in table.emphasised if line == number}))
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}}", r"\end{table}", ""])


def document(tables: Sequence[TextTable], notes: str = "") -> str:
    """Several tables to be read with ``\\input``; comments name the package they need, and carry the notes."""
    head = [r"% needs \usepackage{booktabs}, \usepackage{graphicx} and \usepackage[T1]{fontenc}"]
    texts = "".join(text for table in tables for text in _texts(table))
    strange = sorted({character for character in texts if ord(character) > _LATIN})
    if strange:
        head.append(
            f"% needs LuaLaTeX or XeLaTeX and a font that has {' '.join(strange)}, which pdfLaTeX does not know"
        )
    head += [f"% {line}" for line in notes.splitlines() if line.strip()]
    return "\n".join(head) + "\n\n" + "\n".join(latex(table) for table in tables)


def _texts(table: TextTable) -> Iterator[str]:
    """Title and cells as LaTeX reads them."""
    for cells in ([table.title], table.columns, *table.rows):
        yield from map(escape, cells)


def _line(cells: Sequence[str], bold: Collection[int] = (), *, level: bool = True) -> str:
    texts = [escape(cell) for cell in cells]
    texts = [rf"\textbf{{{text}}}" if n in bold else text for n, text in enumerate(texts)]
    if not level:
        texts[1:] = [rf"\rotatebox{{90}}{{{text}}}" for text in texts[1:]]
    return "    " + " & ".join(texts) + r" \\"

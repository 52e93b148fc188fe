"""The history as one self-contained HTML page, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from cl_methods.bench.history import HistoryError, changes
from cl_methods.bench.record import Record
from cl_methods.bench.tables import record_table
from cl_methods.evaluation.tables import TextTable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 15rem; }
thead th { border-bottom: 2px solid #222; } tr.break td { border-top: 1px solid #bbb; }
img { max-width: 100%; min-width: 44rem; height: auto; margin: .6rem 0; display: block; }
.wide { overflow-x: auto; } li, p, h2 { overflow-wrap: anywhere; } .worse { color: #b3261e; } .better { color: #1b6e3c; }
footer { color: #666; font-size: 13px; margin-top: 3rem; }
"""

_FOOTER = (
    "In brackets: a peer's costs over ours. Times are the best of several rounds, in one run with the peer's; they are "
    "compared beside the peer of the same run, counts exactly. FLOPs: matrix products, convolutions and attention. Saved: "
    "what autograd keeps for the backward pass. Waits: where the host would wait for a GPU. Memory: at the peak of a call, beyond "
    "what was there before it."
)


def write_page(records: Sequence[Record], path: Path) -> list[Path]:
    """Write the page, and a PNG per group of comparable records: PATH's name with a number.

    Args:
        records: the history, oldest first.
        path: of the page; an earlier one is replaced.

    Returns:
        The pictures.

    Raises:
        HistoryError: there is no record.
    """
    from cl_methods.bench import figures  # matplotlib takes longer to load than most commands
    from cl_methods.evaluation.figures import png

    if not records:
        raise HistoryError("history: there is no record to draw; `clk bench --suite step` makes one")
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault(record.key, []).append(record)
    sections, pictures = [], []
    for number, group in enumerate(groups.values(), 1):
        inline = []
        for name, figure in figures.of_group(group).items():
            picture = path.with_name(f"{path.stem}-{number}-{name}.png")
            data = png(figure)
            picture.write_bytes(data)
            pictures.append(picture)
            inline.append((name, "data:image/png;base64," + base64.b64encode(data).decode()))
        sections.append(_section(group, inline))
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>cl-kernels: a record of throughput</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>cl-kernels: a record of throughput</h1>\n{''.join(sections)}\n"
        f"<footer>{html.escape(_FOOTER)}</footer></body></html>\n"
    )
    return pictures


def _section(group: Sequence[Record], pictures: Sequence[tuple[str, str]]) -> str:
    latest = group[-1]
    table = record_table(latest)
    images = "".join(
        f'<div class="wide"><img alt="{html.escape(name)}" src="{source}"></div>' for name, source in pictures
    )
    commit = f"commit {latest.commit[:10]}{' and changes' if latest.dirty else ''}" if latest.commit else "no commit"
    versions = ", ".join(f"{name} {value}" for name, value in latest.versions.items() if isinstance(value, str))
    facts = f"{latest.machine}; {latest.date[:16].replace('T', ' ')} UTC, {commit}; {versions}"
    return (
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(facts)}; records: {len(group)}</p>"
        f"{_changes(group)}{images}{_html_table(table)}"
    )


def _changes(group: Sequence[Record]) -> str:
    if len(group) < 2:
        return "<p>The first record: nothing to compare with.</p>"
    found = changes(group[-2], group[-1])
    if not found:
        return f"<p>Nothing changed beyond its noise since {html.escape(group[-2].date[:16])}.</p>"
    lines = "".join(
        f'<li class="{"worse" if change.worse else "better"}">{html.escape(str(change))}</li>' for change in found
    )
    return f"<p>Since {html.escape(group[-2].date[:16])}:</p><ul>{lines}</ul>"


def _html_table(table: TextTable) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{html.escape(cell.replace('   ', '  ', 1))}</td>" for cell in row)
        body.append(f'<tr class="break">{cells}</tr>' if number in table.breaks else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'

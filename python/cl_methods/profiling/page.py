"""A profile as one HTML page that needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

from cl_kernels.profile import AdapterProfile
from cl_methods.profiling.tables import PlainTable, all_tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h1, h2, p, li, dd { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; } tbody tr:hover { background: #f4f4f4; }
tr.mounted td { color: #B04A00; } .wide { overflow-x: auto; } .tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: #fff; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.tall thead th:first-child { z-index: 1; } tbody tr:hover td:first-child { background: #f4f4f4; }
img { max-width: 100%; min-width: 44rem; height: auto; } .lead { font-size: 1.05rem; }
.warning { background: #fff3cd; border-left: 4px solid #D55E00; padding: .6rem 1rem; }
.note, footer { color: #666; font-size: 13px; } dl { font-size: 13px; } dt { font-weight: 600; } dd { margin: 0 0 .3rem; }
"""

_FOOTNOTE = (
    "FLOPs: 2 for each multiply-add of matrix products and convolutions, from shapes. Operations: dispatched ones that are not "
    "views; on a GPU each is mostly one launch. Host synchronisations: operations that hand numbers, or shapes that depend on "
    "numbers, to the host. Kept for backward: storages that autograd holds, without parameters and inputs, each once. Peak: "
    "bytes of the tensors made during the step that are alive at once, without what an operation uses inside. Times: inside "
    "operations, median and range from the 20th to the 80th percentile; whole steps are timed without any counting. Attention "
    "runs without the shortcut that torch takes in evaluation, as in training."
)


_CAPTIONS = {
    "Where a training step goes": "Every bar begins where the one before it ends. Blue: the model's own modules; orange: what is "
    "mounted on them; grey: the loss and what else is outside of modules; green: the optimiser.",
    "What every layer adds": "Residual blocks from first to last. Orange: what a block costs more than in the frozen model's "
    "forward pass; blue: what such a pass has nothing of.",
    "Live memory over a step": "Bytes of the tensors that the step has made and still needs, after each operation. A phase is as "
    "wide for all three.",
}


def page(profile: AdapterProfile, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        profile: what it shows.
        pictures: PNG files by title.
    """
    title = f"Profile of {profile.subject}"
    tables = {table.title: table for table in all_tables(profile)}
    layers = tables.pop("Layers")
    warning = f'<p class="warning">{html.escape(profile.warning())}</p>' if profile.warning() else ""
    lead = profile.headline().removesuffix(profile.warning()).strip()
    figures = "".join(_picture(name, data) for name, data in pictures.items())
    body = "".join(_table(table) for table in tables.values()) + figures + _table(layers, "wide tall")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>{warning}\n{body}\n'
        f"<details><summary>versions and settings</summary><dl>{_details(profile.details)}</dl></details>"
        f"<footer><p>{html.escape(_FOOTNOTE)}</p></footer></body></html>\n"
    )


def _table(table: PlainTable, box: str = "wide") -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f'<tr class="mounted">{cells}</tr>' if number in table.mounted else f"<tr>{cells}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>{note}<div class="{box}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _picture(title: str, data: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    note = f'<p class="note">{html.escape(_CAPTIONS[title])}</p>' if title in _CAPTIONS else ""
    image = f'<img alt="{html.escape(title, quote=True)}" src="{source}">'
    return f'<h2>{html.escape(title)}</h2>{note}<div class="wide">{image}</div>'


def _details(details: Mapping[str, Any]) -> str:
    found = []
    for name, value in details.items():
        text = (
            "; ".join(f"{key}: {entry}" for key, entry in value.items()) if isinstance(value, Mapping) else str(value)
        )
        found.append(f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(text)}</dd>")
    return "".join(found)

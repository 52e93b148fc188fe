"""The predicted tables of docs/scaling.md: MTIL with five methods on three models, on up to 64 GPUs of three kinds.

    python benchmarks/scaling_tables.py --output benchmarks/results/scaling_predictions.json
    python benchmarks/scaling_tables.py --output benchmarks/results/scaling_predictions.json --print

Nothing is run: work is counted on tensors without data, time and memory are predicted from it. What the file holds is not counted
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cl_methods.commands.configuration import parse
from cl_methods.forecast.hardware import find_hardware
from cl_methods.forecast.prediction import Predictor
from cl_methods.forecast.sizes import scenario_without_files

NAMES = {
    "zscl": "ZSCL",
    "mulki": "MulKI",
    "moe_adapters": "MoE-Adapters",
    "clap4clip": "CLAP4CLIP",
    "ranpac": "RanPAC",
}
MODELS = ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-bigG-14")
HARDWARE = ("a100", "h100", "rtx4090")
PROCESSES = (1, 64, 8)
PRECISIONS = ("fp32", "tf32", "bf16")
LETTERS = {"arithmetic": "a", "memory": "m", "host": "h", "exchange": "x", "reading": "r"}
WORKERS = 8


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=NAMES, action="append", help="these alone")
    parser.add_argument("--model", choices=MODELS, action="append", help="these alone")
    parser.add_argument("--print", action="store_true", help="only print what the file holds")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if options.output.is_file():
        rows = {_key(row): row for row in json.loads(options.output.read_text())}
    if not options.print:
        for model in options.model or MODELS:
            for method in options.method or NAMES:
                for row in predictions(method, model, rows):
                    rows[_key(row)] = row
                    print(_key(row), f"{row['hours']:.3g} h", row["binds"], flush=True)
                lines = ",\n".join(json.dumps(row) for row in rows.values())
                options.output.write_text(f"[\n{lines}\n]\n")
    for model in MODELS:
        print(*table(model, rows), sep="\n")


def predictions(method: str, model: str, known: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Every row of a method and a model that is not known yet."""
    config, _ = parse(["--method", method, "--scenario", "mtil", "--model", model, "--workers", str(WORKERS)], "")
    predictor = None
    for processes, name, precision in itertools.product(PROCESSES, HARDWARE, PRECISIONS):
        head = {"method": method, "model": model, "card": name, "gpus": processes, "products": precision}
        if _key(head) in known:
            continue
        predictor = predictor or Predictor(config, scenario_without_files(config))
        row = predictor.predict(find_hardware(name), processes, precision=precision, fits=True).as_dict()
        if (name, precision) != (HARDWARE[0], PRECISIONS[0]):
            del row["flops_of_a_step"]  # the same for all
        yield head | row


def _key(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("method", "model", "card", "gpus", "products"))


def table(model: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: hours, everything at once, and the limit."""
    cells = [(card, gpus) for card in HARDWARE for gpus in sorted(PROCESSES)]
    lines = ["", f"{model}, hours in fp32", "", "| | " + " | ".join(f"{gpus} x {card}" for card, gpus in cells) + " |"]
    lines.append("|---|" + "---:|" * len(cells))
    for method in NAMES:
        found = [rows.get(f"{method} {model} {card} {gpus} fp32") for card, gpus in cells]
        if any(found):
            lines.append(
                f"| {NAMES[method]} | " + " | ".join("" if row is None else hours(row) for row in found) + " |"
            )
    return lines


def hours(row: dict[str, Any]) -> str:
    """Hours and their limit; nothing where weights, gradients and two moments of what is trained are more than the card holds."""
    if 16 * row["trainable"] > find_hardware(row["card"]).memory:
        return "–"
    digits = f"{row['hours']:.0f}" if row["hours"] >= 9.5 else f"{row['hours']:.2g}"
    return f"{digits} {LETTERS[row['binds']]}"


if __name__ == "__main__":
    main()

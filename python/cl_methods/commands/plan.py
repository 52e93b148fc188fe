"""``clk plan``: what a run would take on hardware that is not at hand."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cl_methods.commands.configuration import parse
from cl_methods.forecast.hardware import PRECISIONS, Hardware, find_hardware, known_hardware
from cl_methods.forecast.prediction import Prediction, Predictor
from cl_methods.forecast.sizes import CAPTIONS, REFERENCE_IMAGES, scenario_without_files
from cl_methods.training.checkpoints.atomic import write_atomically
from cl_methods.training.planning.plan import readable_flops
from cl_methods.training.sizes import format_size

_WIDTH = 120

DESCRIPTION = """Predict hours, memory and limits of a run on GPUs that are not at hand.

Takes every option of `clk run`, and these:
  --hardware NAME,…         {names}, or a YAML file that describes a card (default: h100)
  --processes N,…           GPUs, one process each (default: 1)
  --precision P             of matrix products: fp32 as `clk run` computes, tf32 or bf16 for what faster ones would bring
  --network GBIT            10^9 bits a second that leave a machine, in place of the table's
  --captions N              reference texts of scenario mtil without data.root (default: {captions:,})
  --reference-images N      its reference images (default: {images:,})
  --json FILE               every figure

Scenario mtil needs no data here: tasks then have the published sizes. Nothing is downloaded, trained or written but FILE.
Figures are predictions from counted work and published peaks, see docs/scaling.md. `images at once`: how many go through an encoder
together so that a step fits the GPU; `limit`: what a faster piece of would help most, arithmetic, memory, host (the process that
starts the GPU's operations), exchange (between GPUs) or reading (images, see --workers).

A card of your own, in 10^12 operations a second, GiB, 10^9 bytes a second of memory and to its neighbours, 10^9 bits of network:
  name: my card
  tflops: {{fp32: 40, bf16: 160}}
  memory_gib: 24
  bandwidth: 900
  link: 25
  gpus: 4
  network: 25

examples:
  clk plan --method zscl --scenario mtil --model ViT-L-14 --hardware h100,rtx4090 --processes 1,8,64 --workers 8
  clk plan --method moe_adapters --scenario mtil --hardware rtx4090 --processes 1 --method.batch-size 128
  clk plan --scenario mtil --hardware my_card.yaml --network 10 --processes 16
  clk plan --method zscl --scenario mtil --model ViT-bigG-14 --distributed fsdp --hardware a100 --processes 8"""


def main(arguments: Sequence[str]) -> int:
    """Parse, count, print.

    Raises:
        ValueError: an option is wrong, or the run cannot be counted without data.
        OSError: the file cannot be written.
    """
    description = DESCRIPTION.format(names=", ".join(known_hardware()), captions=CAPTIONS, images=REFERENCE_IMAGES)
    own, rest = _parser().parse_known_args(list(arguments))
    chosen = [_with_network(find_hardware(name), own.network) for name in own.hardware.split(",")]
    for hardware in chosen:
        hardware.peak(own.precision)
    processes = _numbers(own.processes)
    config, _ = parse(rest, description, prog="clk plan")
    scenario = scenario_without_files(config, own.captions, own.reference_images)
    predictor = Predictor(config, scenario)
    found = [predictor.predict(hardware, count, precision=own.precision) for hardware in chosen for count in processes]
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(_table(found, f"{config.method} on {config.scenario}, {config.model}, products in {own.precision}"))
    for line in _notes(found):
        console.print(line, soft_wrap=True, highlight=False)
    if own.json is not None:
        write_atomically(own.json, json.dumps([one.as_dict() for one in found], indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    """The options that `clk run` does not have; its own follow, with the help of both."""
    parser = argparse.ArgumentParser(prog="clk plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--processes", default="1")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--network", type=float)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--reference-images", type=int, default=REFERENCE_IMAGES)
    parser.add_argument("--json", type=Path)
    return parser


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"processes: expected numbers >= 1 separated by commas, got {text!r}")
    return [int(part) for part in parts]


def _with_network(hardware: Hardware, network: float | None) -> Hardware:
    return hardware if network is None else replace(hardware, network=network)


def _table(found: Sequence[Prediction], title: str) -> Table:
    table = Table(title=f"{title}: predicted, not measured", box=SIMPLE)
    columns = (
        "hardware",
        "GPUs",
        "GiB each",
        "images at once",
        "s a step",
        "h training",
        "h evaluation",
        "h in all",
        "limit",
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("hardware", "limit") else "right", no_wrap=column == "hardware"
        )
    for one in found:
        training = one.training_hours + one.between.total / 3600
        table.add_row(
            one.hardware.name,
            str(one.processes),
            "" if one.memory_bytes is None else f"{one.memory_bytes / 2**30:.1f}",
            _parts(one),
            f"{one.step_seconds:.3g}",
            f"{training:.3g}",
            f"{one.evaluation.total / 3600:.2g}",
            f"{one.hours:.3g}",
            "does not fit" if one.too_large else one.whole.binds,
        )
    return table


def _parts(one: Prediction) -> str:
    if one.too_large:
        return "–"
    cut = None if one.memory is None else one.memory.micro_batches
    return "all" if cut is None else f"{cut.images}{', by block' if cut.blocks else ''}"


def _notes(found: Sequence[Prediction]) -> list[str]:
    """What the table has no room for."""
    lines = []
    for count in dict.fromkeys(one.processes for one in found):
        figures = next(one for one in found if one.processes == count).as_dict()
        steps = f"{figures['steps']:,} steps of {readable_flops(figures['flops_per_step'])} each in every process"
        moved, exchanged = (format_size(figures[f"{name}_per_step"]) for name in ("bytes", "exchanged"))
        lines.append(
            f"{count} process{'es' if count > 1 else ''}: {steps}, {moved} read and written, "
            f"{figures['operations_per_step']:,.0f} operations, {exchanged} exchanged; "
            f"{figures['trainable']:,} trained parameters"
        )
    used = {", ".join(one.memory.levers.options): None for one in found if one.memory is not None}
    lines += [f"with {options}; hours do not count what moves between host and GPU" for options in used if options]
    for sentence in dict.fromkeys(one.too_large for one in found if one.too_large):
        lines.append(sentence)
    return lines

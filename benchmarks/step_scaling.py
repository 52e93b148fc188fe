"""What a training step costs along one dimension at a time: counted, measured, and predicted from the counts.

    python benchmarks/step_scaling.py count    --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py measure  --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py fit      --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py draw     --output benchmarks/results/step_scaling.json --figure docs/images/scaling_step.png

``count`` needs no clock and no data, and gives the same everywhere. ``measure`` takes real steps of the same settings on the CPU
at hand (random weights, noise), each beside a large matrix product and a large average of the same moment. ``fit`` chooses the
three constants of the time model on every other measured step, and says how far it is off on those it has not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from cl_methods.bench.own_step import OwnStep, own_steps
from cl_methods.bench.world import World, mini_world, open_clip_world
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.task import Reference, Task
from cl_methods.datasets.texts import classes
from cl_methods.forecast.counting import StageWork, count_work
from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.time_model import Reached, seconds
from cl_methods.forecast.work import Work
from cl_methods.methods import METHODS
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.without_data import BlankImages

ROUNDS, IMAGES = 3, 128
"""Timed rounds; images of a task."""
SIDE, LENGTH = 1024, 2**23
"""Of the product and of the average that are timed beside every step."""


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        axis, value: which dimension is moved, and where it is.
        method, model, batch, classes, captions, experts: settings.
        task: the one that is learnt, counted from 1.
        ranks: processes; more than one are counted only.
        measured: whether it is timed too.
    """

    axis: str
    value: float
    method: str = "zscl"
    model: str = "ViT-S-32"
    batch: int = 4
    classes: int = 10
    captions: int = 250
    experts: int | None = None
    task: int = 2
    ranks: int = 1
    measured: bool = True


def cases() -> Iterator[Case]:
    """Every curve; all of one axis cross at the defaults of :class:`Case`."""
    timed = {"zscl": (2, 8, 16), "moe_adapters": (2, 8), "mulki": (2, 8)}
    for method, batches in timed.items():
        for batch in (1, 2, 4, 8, 16, 32, 64):
            yield Case(f"batch, {method}", batch, method=method, batch=batch, measured=batch in batches)
    for batch in (8, 32, 128):
        for method in timed:
            yield Case(f"batch, {method}, mini", batch, method=method, model="mini", batch=batch)
    for method in timed:
        for number in (5, 10, 20, 40):
            yield Case(f"classes, {method}", number, method=method, classes=number, measured=number == 40)
    for model, millions in (
        ("ViT-S-32", 63),
        ("ViT-M-32", 104),
        ("ViT-B-32", 151),
        ("ViT-L-14", 428),
        ("ViT-bigG-14", 2540),
    ):
        yield Case("model, million parameters", millions, model=model, measured=model in ("ViT-M-32", "ViT-B-32"))
    for captions in (250, 1000, 4000, 16000, 64000):
        yield Case("reference texts", captions, captions=captions, measured=captions == 1000)
    for experts in (2, 4, 8, 22, 64):
        yield Case("experts", experts, method="moe_adapters", experts=experts, measured=experts in (4, 64))
    for task in (1, 2, 4, 8, 11):
        yield Case("tasks learnt, clap4clip", task, method="clap4clip", task=task, measured=False)
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        yield Case("ranks", ranks, model="ViT-B-16", batch=64, ranks=ranks, measured=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "measure", "fit", "draw"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, default=Path("docs/images/scaling_step.png"))
    parser.add_argument("--axis", help="cases whose axis begins like this alone")
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="measure: stop after this long; go on by calling again"
    )
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}

    def save() -> None:
        found["cases"] = list(rows.values())
        options.output.write_text(json.dumps(found) + "\n")

    rows: dict[str, dict[str, Any]] = {row["key"]: row for row in found.get("cases", [])}
    if options.what == "draw":
        draw(found).savefig(options.figure, dpi=110)
        return
    wanted = [case for case in cases() if options.axis is None or case.axis.startswith(options.axis)]
    if options.what == "count":
        for case in wanted:
            if key(case) not in rows:
                rows[key(case)] = {"key": key(case), **dataclasses.asdict(case), **count(case)}
                print(key(case), f"{rows[key(case)]['flops']:.3g} FLOPs", flush=True)
                save()
    elif options.what == "measure":
        torch.set_num_threads(1)
        found["machine"] = {"threads": 1, "torch": torch.__version__}
        deadline = time.perf_counter() + options.seconds
        for case in wanted:
            row = rows[key(case)]
            if case.measured and "seconds" not in row and time.perf_counter() < deadline:
                row |= measure(case)
                print(key(case), f"{row['seconds']:.4f} s, product {row['product']:.4f} s", flush=True)
                save()
    else:
        found |= fit(list(rows.values()))
        print(json.dumps({name: found[name] for name in ("reached", "errors")}, indent=1))
    save()


def key(case: Case) -> str:
    return f"{case.axis} {case.value:g}"


def world_of(case: Case) -> World:
    if case.model == "mini":
        return mini_world(case.captions)
    return open_clip_world(case.model, case.captions, shapes=False, class_count=case.classes)


def prepared(case: Case) -> tuple[OwnStep, World]:
    """A real step of the second task, taken twice before."""
    world = world_of(case)
    return next(iter(own_steps(case.method, world, settings_of(case), case.batch).values())), world


def settings_of(case: Case) -> Any:
    settings = METHODS[case.method].default_config("mini" if case.model == "mini" else "mtil")
    if case.experts is not None:
        settings = dataclasses.replace(settings, experts=case.experts, freeze=0)
    names = [name for name in ("batch_size", "reference_batch_size") if hasattr(settings, name)]
    return dataclasses.replace(settings, **dict.fromkeys(names, case.batch))


def count(case: Case) -> dict[str, Any]:
    """The counted step of the second task: what the time model needs, and the figures of the page."""
    stage = counted(case)
    work = stage.step
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "operations": work.operations,
        "saved": stage.saved,
        "exchanged": work.exchanged,
        "calls": [[*call, times] for call, times in sorted(work.calls.items())] if case.measured else [],
    }


def counted(case: Case) -> StageWork:
    config = RunConfig(case.method, settings_of(case), "mini", model=case.model)
    if case.model == "mini":
        world = mini_world(case.captions)
        tasks, reference = world.tasks, world.reference
    else:
        tasks = tuple(blank_task(number, case.classes) for number in range(max(2, case.task)))
        reference = Reference(BlankImages(IMAGES, 1), ("a photo of a dog",) * case.captions)
    work = count_work(config, Scenario("world", "I", tasks, reference), case.ranks, lists=False)
    return next(stage for stage in work.stages if stage.task == tasks[case.task - 1].name)


def blank_task(number: int, count: int) -> Task:
    """As :func:`~cl_methods.bench.world.open_clip_world` makes its two, without images; further ones like the second."""
    texts = classes(DATASETS["DTD" if number else "Aircraft"].name, "zscl")
    names = tuple(list(texts.names)[:count])
    return Task(f"task {number}", names, texts.templates, *(BlankImages(IMAGES, count) for _ in range(3)))


def measure(case: Case) -> dict[str, float]:
    """Best processor seconds of one thread for some steps, and for a large product and a large average between them.

    Processor time, because other work shares the machine; what that costs in caches and bandwidth, product and average pay as well.
    """
    step, _ = prepared(case)
    a = torch.randn(SIDE, SIDE)
    x, y = torch.randn(LENGTH), torch.randn(LENGTH)
    best = dict.fromkeys(("seconds", "product", "average"), float("inf"))
    works = {"seconds": step.run, "product": lambda: a @ a, "average": lambda: x.lerp_(y, 0.5)}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    return best


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the two ceilings and the time of a call, from every other measured row; the errors on the others."""
    measured = sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
    train, test = measured[::2], measured[1::2]
    best = (np.inf, (0.0, 0.0, 0.0))
    centre, width = np.log([0.7, 1.0, 5e-6]), np.log([4.0, 6.0, 10.0])
    for _ in range(4):
        grids = [np.exp(np.linspace(m - w / 2, m + w / 2, 9)) for m, w in zip(centre, width, strict=True)]
        for products in grids[0]:
            for memory in grids[1]:
                for call in grids[2]:
                    off = errors(train, Reached(products=products, memory=memory, call=call))
                    best = min(best, (float(np.square(np.log(off)).mean()), (products, memory, call)))
        centre, width = np.log(best[1]), width / 3
    reached = Reached(**dict(zip(("products", "memory", "call"), map(float, best[1]), strict=True)))
    for row in measured:
        row["predicted"] = float(errors([row], reached)[0] * row["seconds"])
    found = {"fitted": summary(errors(train, reached)), "not_seen": summary(errors(test, reached))}
    return {"reached": {name: getattr(reached, name) for name in ("products", "memory", "call")}, "errors": found}


def hardware(row: dict[str, Any]) -> Hardware:
    """One thread of the machine, as fast as it was when the step was measured."""
    return Hardware("CPU", {"fp32": 2e-12 * SIDE**3 / row["product"]}, 8, 12e-9 * LENGTH / row["average"], 1)


def errors(rows: list[dict[str, Any]], reached: Reached) -> np.ndarray:
    """Predicted over measured seconds of each row."""
    works = [Work(Counter({(flops, moved): times for flops, moved, times in row["calls"]})) for row in rows]
    predicted = [
        seconds(work, hardware(row), reached=reached, asynchronous=False).computing
        for work, row in zip(works, rows, strict=True)
    ]
    return np.array(predicted) / np.array([row["seconds"] for row in rows])


def summary(ratios: np.ndarray) -> dict[str, float]:
    off = np.abs(ratios - 1)
    return {"steps": len(ratios), "median": float(np.median(off)), "largest": float(off.max())}


def draw(found: dict[str, Any]) -> Figure:
    """One panel per axis: FLOPs as counted, seconds as measured and predicted, each over its value at the first point."""
    axes = list(dict.fromkeys(row["axis"] for row in found["cases"]))
    columns = 4
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        panel_of(panel, axis, [row for row in found["cases"] if row["axis"] == axis])
    for panel in panels[len(axes) :]:
        panel.set_axis_off()
    panels[0].legend(frameon=False, fontsize=6)
    return figure


def panel_of(panel: Any, axis: str, rows: list[dict[str, Any]]) -> None:
    values = [row["value"] for row in rows]
    if axis == "ranks":
        panel.plot(
            values,
            [row["flops"] / 1e12 for row in rows],
            "o-",
            color="#0072B2",
            markersize=3,
            label="TFLOPs of a process",
        )
        panel.plot(
            values,
            [row["exchanged"] / 2**30 for row in rows],
            "s--",
            color="#D55E00",
            markersize=3,
            label="GiB exchanged",
        )
        panel.legend(frameon=False, fontsize=6)
    else:
        panel.plot(values, [row["flops"] / 1e9 for row in rows], "-", color="#999999", label="GFLOPs, counted")
        timed = [row for row in rows if "predicted" in row]
        scale = np.median([row["flops"] / 1e9 / row["seconds"] for row in timed]) if timed else 1
        at = [row["value"] for row in timed]
        for name, what, style, color in (
            ("seconds", "measured", "o", "#0072B2"),
            ("predicted", "predicted", "x", "#D55E00"),
        ):
            times = [row[name] * scale for row in timed]
            panel.plot(at, times, style, color=color, markersize=4, label=f"time, {what}")
    panel.set(xscale="log", yscale="log", title=axis)
    panel.title.set_fontsize(8)
    panel.tick_params(labelsize=6)
    panel.set_xticks(values, [f"{value:g}" for value in values], fontsize=6)
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()

"""``clk export``: trained weights as files that open_clip, this package or the public code of MoE-Adapters loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from cl_methods.backbone import MINI_WEIGHTS
from cl_methods.methods.find import find_method
from cl_methods.training.export import NewFolder
from cl_methods.training.export.learnt import ADAPTER_CONFIG, read_adapter
from cl_methods.training.export.sources import export_file, export_public, export_run

DESCRIPTION = """Write trained weights as files that others load.

A method that trains all of CLIP becomes open_clip_model.safetensors with its configuration, which open_clip loads as
`local-dir:DIR`; one that adds something to a frozen CLIP becomes adapter_model.safetensors with its configuration, which
`cl_methods.training.export.load_adapter` puts onto a fresh backbone. Checkpoints of ZSCL's and MoE-Adapters' public code become
the same; --layout moe-adapters4cl writes what the latter loads. docs/weights.md has every form.

examples:
  clk export runs/zscl-1 --output exported/zscl
  clk export runs/moe --task 3 --output exported/moe-after-3
  clk export runs/moe --output for-public-code --layout moe-adapters4cl
  clk export SUN397.pth --model ViT-B-16-quickgelu --output exported/zscl          a checkpoint of ZSCL
  clk export SUN397.pth --model ViT-B-16-quickgelu --detector SUN397_autochooser.pth --output exported/moe"""


@dataclass
class Export:
    """What to export.

    Attributes:
        source: directory of a run, folder of an adapter file, or file of weights.
        output: folder to make; must not exist or be empty.
        layout: cl-methods, or moe-adapters4cl for the public code of MoE-Adapters.
        task: after which task of a run, counted from 1; the last one if not given.
        model: open_clip name, for a file of weights.
        pretrained: the weights that a run started from, if they lie elsewhere now.
        detector: list of autoencoders, for a checkpoint of MoE-Adapters.
        frozen: list of frozen experts, for a checkpoint of MoE-Adapters.
        with_model: put the frozen CLIP beside an adapter file too.
        method: MODULE:CLASS or PATH.py:CLASS of your own, if the run is of one; runs that file, which no run directory may.
    """

    source: Annotated[Path, tyro.conf.Positional]
    output: Path
    layout: Literal["cl-methods", "moe-adapters4cl"] = "cl-methods"
    task: int | None = None
    model: str | None = None
    pretrained: str | None = None
    detector: Path | None = None
    frozen: Path | None = None
    with_model: bool = False
    method: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Write the folder and say how it is loaded.

    Raises:
        ValueError: the source cannot be exported in this way.
        FileNotFoundError: there is no such source.
    """
    options = tyro.cli(Export, args=list(arguments), prog="clk export", description=DESCRIPTION)
    for name in ("source", "detector", "frozen"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{name}: {path} does not exist")
    _check(options, {name: getattr(options, name) for name in ("model", "detector", "frozen", "task")})
    if options.method is not None:
        find_method(options.method)
    with NewFolder(options.output) as folder:
        if options.layout == "moe-adapters4cl":
            written = export_public(options.source, folder, options.task, options.pretrained)
        elif options.source.is_file():
            assert options.model is not None
            written = export_file(
                options.source, folder, options.model, options.detector, options.frozen, with_model=options.with_model
            )
        else:
            written = export_run(
                options.source, folder, options.task, options.pretrained, with_model=options.with_model
            )
    console = Console(soft_wrap=True, highlight=False)
    for name in written:
        console.print(f"{options.output / name}  {(options.output / name).stat().st_size:,} bytes", markup=False)
    console.print(_how_to_load(options), markup=False)
    return 0


def _check(options: Export, given: Mapping[str, Any]) -> None:
    """Options that do not belong to the source.

    Raises:
        ValueError: one is missing, or has no meaning for it.
    """
    file = options.source.is_file()
    if file and options.layout == "moe-adapters4cl":
        raise ValueError(f"layout: moe-adapters4cl is made from a run or an adapter file, {options.source} is a file")
    if file and options.model is None:
        raise ValueError(
            "model: a file of weights does not name its architecture; give --model, such as ViT-B-16-quickgelu"
        )
    if file and options.pretrained is not None:
        raise ValueError("pretrained: a file of weights brings its own; only runs and adapter files take --pretrained")
    wrong = [name for name in (("task",) if file else ("model", "detector", "frozen")) if given[name] is not None]
    if wrong:
        what = "file of weights" if file else "run or an adapter file"
        raise ValueError(f"{wrong[0]}: has no meaning for a {what}, got {given[wrong[0]]}")


def _how_to_load(options: Export) -> str:
    if options.layout == "moe-adapters4cl":
        return "the public code loads the model with --load, a list of autoencoders with --load_autochooser; see docs/weights.md"
    if (options.output / ADAPTER_CONFIG).is_file():
        adapter, _ = read_adapter(options.output)
        return (
            f"{adapter.method} after {', '.join(adapter.tasks) or 'its last task'}; "
            f"`clk run --weights {options.output} …` goes on from it, "
            f'and cl_methods.training.export.load_adapter("{options.output}") loads it'
        )
    if (options.output / MINI_WEIGHTS).is_file():
        return f"load it with --model local-dir:{options.output}; no configuration of open_clip describes this model"
    return f"load it with --model local-dir:{options.output}, or open_clip.create_model_and_transforms of the same name"

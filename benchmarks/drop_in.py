"""The public codebases themselves, as they are and patched: same numbers, fewer operations, less time.

    git clone https://github.com/JiazuoYu/MoE-Adapters4CL; git clone https://github.com/aimagelab/mammoth; …
    python benchmarks/drop_in.py --moe-adapters4cl MoE-Adapters4CL --mammoth mammoth --zscl ZSCL --clip --output drop_in.json

Nothing of them is installed or changed: the files that define the model, and ZSCL's helpers, are loaded from the checkout. Dropout
is 0 where numbers are compared, because its masks come from another generator, and as published where time is measured. Times are
the best of some rounds, turn about; those of the adapters are without attention and MLP.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drop_in_moe import FILES, costs, differences
from drop_in_zscl import zscl
from side_by_side import best, load
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl_kernels import drop_in

Row = dict[str, Any]


def texts(rounds: int, clock: Callable[[], float]) -> Row:
    """The text tower of open_clip's ViT-B/16, 100 prompts of 9 tokens, forward and backward."""
    from cl_methods.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    import open_clip

    model = open_clip.create_model("ViT-B-16")
    patched = copy.deepcopy(model)
    drop_in.patch_clip(patched)
    tokens = torch.zeros(100, 77, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1:8], tokens[:, 8] = 49406, torch.randint(300, 40000, (100, 7)), 49407
    results, flops = [], []

    def run(m: nn.Module) -> Tensor:
        m.zero_grad()
        features = m.encode_text(tokens)
        features.square().mean().backward()
        return features.detach()

    for m in (model, patched):
        with FlopCounterMode(display=False) as count:
            results.append(run(m))
        flops.append(count.get_total_flops())
    seconds = best({"published": lambda: run(model), "patched": lambda: run(patched)}, rounds, clock)
    return {
        "difference": float((results[0] - results[1]).abs().max() / results[0].abs().max()),
        "FLOPs, published / patched": flops[0] / flops[1],
        "seconds": seconds,
        "time, published / patched": seconds["published"] / seconds["patched"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("moe-adapters4cl", "mammoth", "zscl"):
        parser.add_argument(f"--{name}", type=Path, help=f"checkout of {name}")
    parser.add_argument("--clip", action="store_true", help="also measure open_clip's text tower")
    parser.add_argument("--batch", type=int, default=64, help="images in the adapters' block; 64 as published")
    parser.add_argument("--whole", action="store_true", help="also time the block with attention and MLP")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    parser.add_argument(
        "--processor-time", action="store_true", help="for one thread on a machine that does other work"
    )
    parser.add_argument("--threads", type=int, help="of torch; as many as it finds by default")
    parser.add_argument(
        "--skip-differences", action="store_true", help="of the blocks, which take ten steps of two towers"
    )
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    rows: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "clock": clock.__name__}

    def add(name: str, row: Any) -> None:
        rows[name] = row
        print(f"{name}: {json.dumps(row, indent=1)}", flush=True)
        if args.output is not None:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")

    roots = {"mtil": args.moe_adapters4cl, "cil": args.moe_adapters4cl, "mammoth": args.mammoth}
    for variant, root in roots.items():
        if root is not None:
            module = load(root / FILES[variant], f"public_{variant}")
            if not args.skip_differences:
                add(f"{variant}, differences", differences(module, variant))
            add(f"{variant}, adapters", costs(module, variant, args.batch, args.rounds, False, clock))
            if args.whole:
                add(f"{variant}, whole block", costs(module, variant, args.batch, args.rounds, True, clock))
    if args.zscl is not None:
        for name, row in zscl(args.zscl, args.rounds, clock):
            add(f"zscl, {name}", row)
    if args.clip:
        add("open_clip text", texts(args.rounds, clock))
    if not any((*roots.values(), args.zscl, args.clip)):
        parser.error("nothing to measure: name at least one checkout, or --clip")


if __name__ == "__main__":
    main()

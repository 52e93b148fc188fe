"""Prints how many bytes one step of feature distillation takes beyond its inputs: python peak_memory.py N M d threads."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import cl_kernels as clk


def status(name: str) -> int:
    """VmRSS is what is resident now, VmHWM its peak since this program was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def main(N: int, M: int, d: int, threads: int) -> None:
    torch.set_num_threads(threads)

    def step(features: list[torch.Tensor]) -> None:
        features[0].requires_grad_()
        clk.feature_distill_kl(*features, logit_scale=100.0, backend="cpu").backward()

    step([torch.randn(rows, d).mul_(d**-0.5) for rows in (64, 64, 300)])  # code, threads
    features = [torch.randn(rows, d).mul_(d**-0.5) for rows in (N, N, M)]
    before, highest = status("VmRSS"), status("VmHWM")
    assert highest - before < 4 << 20, f"{highest - before} bytes were freed before: the peak would not show"
    step(features)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

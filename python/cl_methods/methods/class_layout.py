"""Which class belongs to which task, as tensors for products over all tasks at once."""

from __future__ import annotations

import math

import torch


class ClassLayout:
    """Where the classes of each task are among all C of them, as tensors that training steps need again and again.

    Attributes:
        sizes: classes of each task.
        padded: (T, n) int64, the classes of each task; rows are filled up to the largest with class 0.
        places: (C,) int64, where each class is in ``padded`` flattened.
        mask: (C, C), 0 between classes of one task and −inf elsewhere.
        shares: (C,) one over the classes of the task.
        targets: (C,) int64, 0 to C − 1.
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.sizes, widest, count = sizes, max(sizes, default=0), sum(sizes)
        padded = torch.zeros(len(sizes), widest, dtype=torch.int64)
        places: list[int] = []
        task: list[int] = []
        for place, size in enumerate(sizes):
            first = len(task)
            padded[place, :size] = torch.arange(first, first + size)
            places += range(place * widest, place * widest + size)
            task += [place] * size
        of_task = torch.tensor(task, dtype=torch.int64)
        self.padded, self.places = padded.to(device), torch.tensor(places, dtype=torch.int64).to(device)
        self.mask = torch.zeros(count, count).masked_fill(of_task[:, None] != of_task, -math.inf).to(device)
        self.shares = (1 / torch.tensor(sizes, dtype=torch.float32))[of_task].to(device)
        self.targets = torch.arange(count).to(device)

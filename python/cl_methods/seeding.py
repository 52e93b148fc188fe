"""Random numbers as a pure function of (seed, task, step), so that nothing depends on what ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from the given numbers and names: the first 8 bytes of their BLAKE2b hash.

    Different keys give unrelated generators, which adding numbers to a base seed would not.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_seed(seed: int, task_index: int, step: int) -> int:
    """Seed of the random numbers drawn inside one optimiser step (dropout, gating noise)."""
    return derive_seed(seed, "task", task_index, "step", step)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (all devices), NumPy and ``random``."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_host(seed: int) -> None:
    """Seed the generators that image transforms draw from; those of other devices are left alone."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def host_seed(seed: int) -> Iterator[None]:
    """:func:`seed_host` inside; afterwards the generators go on from where they were."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    seed_host(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])

"""Random numbers that are the same on every machine and for every version of numpy."""

from __future__ import annotations

import numpy as np

Shape = int | tuple[int, ...]


class Stream:
    """Random numbers from the raw output of PCG64.

    numpy promises the raw stream of a bit generator for ever, but not what its distributions make of it; so the few
    distributions needed here are built from 64-bit words with integer shifts and exactly rounded float32 operations.

    Args:
        key: non-negative integers; streams with different keys are independent.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def _words(self, shape: Shape) -> np.ndarray:
        return self._bits.random_raw(int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def uniform(self, low: float, high: float, shape: Shape) -> np.ndarray:
        """Uniform in [low, high): float32 of the given shape, 24 random bits each."""
        unit = (self._words(shape) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return np.float32(low) + unit * np.float32(high - low)

    def integers(self, bound: int | np.ndarray, shape: Shape) -> np.ndarray:
        """Integers in [0, bound): int64 of the given shape; ``bound`` broadcasts to it and stays below 2**32."""
        words = self._words(shape) >> np.uint64(32)
        return ((words * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)

    def chance(self, probability: float, shape: Shape) -> np.ndarray:
        """True with the given probability: bool of the given shape."""
        return self.uniform(0.0, 1.0, shape) < np.float32(probability)

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """Nearly normal noise, mean 0, variance 1: float32 of the given shape, each the sum of four random bytes."""
        count = int(np.prod(shape, dtype=np.int64))
        parts = self._bits.random_raw((count + 1) // 2).astype("<u8").view(np.uint8).reshape(-1, 4).astype(np.int32)
        total = parts[:, 0] + parts[:, 1] + parts[:, 2] + parts[:, 3] - 510
        return (total[:count].astype(np.float32) * np.float32(1.0 / 147.8)).reshape(shape)

    def permutation(self, count: int) -> np.ndarray:
        """A random order of ``range(count)``: int64 (count,)."""
        return np.argsort(self._words(count), kind="stable")

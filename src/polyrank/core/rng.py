"""Named random streams: every purpose, round and client draws from a generator of its own.

Nothing global is seeded or read. Two streams with different paths are independent, and a stream depends on
nothing but the seed and its path; that is why every method of a comparison sees the same split and cohorts.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def _entropy(seed: int, path: tuple[str | int, ...]) -> int:
    # The type is hashed with the value: client 1 and client "1" are different streams.
    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """An independent generator for one purpose, for example ``stream(seed, "fit", round, client)``.

    >>> stream(0, "cohort", 3).integers(100) == stream(0, "cohort", 3).integers(100)
    np.True_
    >>> stream(0, "cohort", 3).integers(2**60) == stream(0, "cohort", 4).integers(2**60)
    np.False_
    """
    return np.random.Generator(np.random.PCG64(_entropy(seed, path)))


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A CPU ``torch.Generator`` that continues `rng` (one 63-bit draw is taken from it)."""
    generator = torch.Generator()
    generator.manual_seed(int(rng.integers(2**63 - 1)))
    return generator

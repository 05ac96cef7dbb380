"""Standard normal noise: of a named stream, so that a simulation can be repeated, or of the operating system's entropy.

Noise protects only while nobody can compute it. Streams are named under the run's seed, which the server knows, so a
deployment draws from entropy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from polyrank.core.rng import stream, torch_generator

Noise = Callable[[Sequence[int]], Tensor]
"""Independent standard normal numbers, float64 on the CPU, of a shape."""


def seeded(rng: np.random.Generator) -> Noise:
    """The noise of a stream (one draw is taken from it)."""
    generator = torch_generator(rng)
    return lambda shape: torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def secret(shape: Sequence[int]) -> Tensor:
    """Noise of the operating system's entropy, by Box and Muller's transform of 53-bit uniform numbers.

    z = sqrt(-2 log u) cos(2 pi v),   u in (0, 1], v in [0, 1)
    """
    count = math.prod(shape)
    bits = np.frombuffer(os.urandom(16 * count), dtype="<u8").reshape(2, count) >> np.uint64(11)
    u, v = (bits[0] + 1.0) * 2.0**-53, bits[1] * 2.0**-53
    return torch.from_numpy(np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)).reshape(tuple(shape))


def noise_of(secretly: bool, seed: int, *path: str | int) -> Noise:
    """The noise for one purpose.

    Args:
        secretly: from entropy; else from the stream of this name.
        seed: of the run.
        path: names the stream.
    """
    return secret if secretly else seeded(stream(seed, *path))

"""The same rank everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polyrank.core.method import Ranks
from polyrank.core.types import ModelSpec


def uniform(
    budget: int, caps: Ranks, scores: Mapping[str, float], spec: ModelSpec, rng: np.random.Generator
) -> dict[str, int]:
    """The same rank for every layer, ``budget // layers``, at most each layer's cap.

    What the division leaves over is not spent: an equal rank is what "uniform" means in the literature.
    """
    if not caps:
        return {}
    share = budget // len(caps)
    return {layer: min(share, cap) for layer, cap in caps.items()}

"""Poisson sampling: every example is in a step's sample, or not, by a draw of its own."""

from __future__ import annotations

import math

import numpy as np

from polyrank.core.types import LocalTraining
from polyrank.local.data import Indices


def rate(local: LocalTraining, examples: int) -> float:
    """The probability that an example is in a step's sample, such that ``batch * accumulate`` are, in the mean."""
    return min(1.0, local.batch * local.accumulate / examples)


def steps(local: LocalTraining, examples: int) -> int:
    """Optimizer steps of a round; none without examples."""
    if not examples:
        return 0
    return local.steps if local.steps is not None else local.epochs * math.ceil(1 / rate(local, examples))


def poisson(indices: Indices, local: LocalTraining, rng: np.random.Generator) -> list[Indices]:
    """The samples of a round's steps: every example is in each, or not, by a draw of its own."""
    count = steps(local, len(indices))
    return [indices[rng.random(len(indices)) < rate(local, len(indices))] for _ in range(count)]

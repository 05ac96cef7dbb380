"""RBLA: each row is averaged over the clients that own it (arXiv 2408.08699)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.fedit import fedit
from polyrank.methods.aggregate.sums import Absent, Weights


def rbla(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    layers: Absent = "renormalise",
) -> ServerState:
    """Averages row j of A and column j of B over the clients of rank above j.

        A[j] = sum_{i: r_i > j} n_i A_i[j] / sum_{i: r_i > j} n_i,   B[:, j] likewise

    High ranks, which few clients own, are not diluted. Not exact: cross terms. Filling missing rows with the owners'
    mean (replication padding, arXiv 2406.17477) gives the same.

    References:
        Chen et al., Rank-Based LoRA Aggregation. arXiv 2408.08699.
    """
    return fedit(state, updates, rng, weights=weights, rows="renormalise", layers=layers)

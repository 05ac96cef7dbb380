"""FedIT: the weighted mean of A and the weighted mean of B (arXiv 2305.05644)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.sums import Absent, Weights, factor_mean, weighted, with_layers


def fedit(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    rows: Absent = "renormalise",
    layers: Absent = "renormalise",
) -> ServerState:
    """The weighted mean of A and of B, separately.

        A = sum p_i A_i,   B = sum p_i B_i

    Not the mean of the products: B A - sum p_i B_i A_i is minus the weighted covariance of B_i and A_i. It is exact
    where one factor is frozen and shared (FFA-LoRA, RoLoRA), at unequal ranks with ``rows="zero"``.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: unused.
        weights: ``size`` (examples) or ``uniform``.
        rows: what a client counts as in rows beyond its rank.
        layers: what a client counts as in layers it does not hold.

    References:
        Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning. arXiv 2305.05644.
    """
    mean = factor_mean(state.adapter.layers, weighted(updates, weights), rows=rows, layers=layers)
    return with_layers(state, mean)

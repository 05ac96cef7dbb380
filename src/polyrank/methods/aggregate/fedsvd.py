"""FedSVD: B is averaged, then A and B are re-factorised by SVD (arXiv 2505.12805)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from polyrank.core.method import Positive
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import settle
from polyrank.methods.aggregate.sums import Absent, Weights, factor_mean, weighted, with_layers


def fedsvd(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    rows: Absent = "zero",
    layers: Absent = "renormalise",
    period: Positive = 1,
    warmup: int = 0,
) -> ServerState:
    """The mean of the trained factors, then a re-factorisation that leaves the product unchanged.

        B = sum p_i B_i;   then  B A = U S V^T,   A <- V^T,   B <- U S

    With B-only rounds (``factors: only_b``) the mean is exact, at unequal ranks too (zero-padded, nested rows of one
    A). The orthonormal rows of A adapt from round to round and bound the gradient of B.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the product has no energy at all.
        weights: ``size`` or ``uniform``.
        rows: what a client counts as in rows beyond its rank.
        layers: what a client counts as in layers it does not hold.
        period: rounds between re-factorisations.
        warmup: rounds before the first.

    References:
        Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA. arXiv 2505.12805.
    """
    server = state.adapter.layers
    mean = factor_mean(server, weighted(updates, weights), rows=rows, layers=layers)
    done = state.round + 1 - warmup
    if done > 0 and done % period == 0:
        mean = settle(mean, server, rng)
    return with_layers(state, mean)

"""FlexLoRA: the exact mean of products, handed out by truncated SVD (arXiv 2402.11505)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from polyrank.core.method import Positive
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import products, settle
from polyrank.methods.aggregate.sums import Absent, Weights, weighted, with_layers


def flexlora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    layers: Absent = "renormalise",
    rank: Positive | None = None,
) -> ServerState:
    """The exact weighted mean of the updates' products, kept at the server's rank.

        D = sum p_i s_i B_i A_i,   A = V_R^T,   B = U_R S_R / s

    The aggregate is exact; what the server keeps is its best rank-R approximation, and what a client of rank r gets
    its best rank-r approximation: the energy beyond is not fed back.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh if the aggregate has fewer than R.
        weights: ``size`` or ``uniform``.
        layers: what a client counts as in layers it does not hold.
        rank: the rank R the server keeps from now on (None: as before).

    References:
        Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources.
        arXiv 2402.11505.

    Note:
        The released code forms the d_out x d_in product and fixes alpha to 16; here every client's own scale counts.
    """
    server = state.adapter.layers
    means = products(server, weighted(updates, weights), layers)
    return with_layers(state, settle(means, server, rng, rank))

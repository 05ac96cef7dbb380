"""Norm clipping: no client changes the model by more than a bound (arXiv 1911.07963)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from annotated_types import Gt

from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import settle
from polyrank.methods.aggregate.robust import Rows, change_products, finite, mean_of_changes, replaced
from polyrank.methods.aggregate.sums import Absent, Weights, weighted

Size = Annotated[float, Gt(0)]

_log = logging.getLogger(__name__)


def norm_clipping(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    multiple: Size = 1.0,
    bound: Size | None = None,
    weights: Weights = "uniform",
    rows: Rows = "keep",
    layers: Absent = "renormalise",
) -> ServerState:
    """The exact mean of products, no client's change of the whole model being larger than a bound.

        D = S + sum_i p_i min(1, bound / || M_i ||_F) change_i,   bound = multiple * median_i || M_i ||_F

    S is what the server holds, M_i all that client i changed, in all layers and dense parameters together, and change_i
    its part in this layer; norms are those of products. The dense parameters follow with the same factor. Where all of
    K clients hold all layers, one moves the mean by bound / K at most, and can do so in every round: a bound on the
    damage, not a cure. In a layer that few hold it moves more, unless ``layers: keep`` counts the others too.

    A client that sends what is not finite counts as absent.

    Cost: as flexlora, and 2 (d_out + d_in) q^2 operations a layer in float64 for the norms, q = sum r_i + R. Holds the
    cohort.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the result has fewer than the server's rank.
        multiple: of the median norm of the round's changes (of an even number of clients the lower of the two).
        bound: the largest norm itself, in place of a multiple.
        weights: ``uniform``, or by ``size``, which believes the number of examples that a client states.
        rows: what a client counts as in rows beyond its rank: the server's (``keep``) or ``zero``.
        layers: what a client counts as in layers it does not hold.

    References:
        Sun et al., Can You Really Backdoor Federated Learning? arXiv 1911.07963.

    Note:
        The paper's bound is a number; the median follows the norms as they fall during training.
    """
    cohort = [(u, weight) for u, weight in weighted(updates, weights) if weight > 0 and _usable(u)]
    if not cohort:
        return replaced(state, {}, {})
    sent = [update for update, _ in cohort]
    norms = change_products(state, sent, rows, layers).diagonal().clamp(min=0).sqrt().tolist()
    most = multiple * sorted(norms)[(len(norms) - 1) // 2] if bound is None else bound
    factors = [1.0 if norm <= most else most / norm for norm in norms]
    means, dense = mean_of_changes(state, sent, [weight for _, weight in cohort], factors, rows, layers)
    return replaced(state, settle(means, state.adapter.layers, rng), dense)


def _usable(update: Update) -> bool:
    if not finite(update):
        _log.warning("client %r sent what is not finite, and counts as absent", update.client)
        return False
    return True

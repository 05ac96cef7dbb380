"""HRALoRA: the mean of what clients trained, put back into singular order (CCGrid 2026)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from polyrank.core.compress import compress_all
from polyrank.core.lowrank import LowRank, pad
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.sums import Absent, Weights, factor_mean, weighted, with_layers


def hralora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    refactor: bool = True,
    segments: bool = False,
) -> ServerState:
    """The mean of what clients trained of the server's adapter, then re-factorised without changing the product.

        A[j] <- A[j] + sum_{i in C: r_i > j} p_i (A_i[j] - A[j]),   B[:, j] likewise,   p_i = n_i / sum_{i in C} n_i
        then   B A = U S V^T,   A <- sqrt(S) V^T,   B <- U sqrt(S)

    per layer, with C the clients that trained it. Components are sorted by energy afterwards, so that a client of rank
    r trains the r strongest, and the factors are balanced, ``B^T B = A A^T = S``. A layer that nobody trained stays as
    it is, bit for bit. A component of (next to) no energy keeps a row of A of norm 1 and lives on.

    Exact where a round trains one factor and clients run the whole adapter (``dispatch: whole``), at any ranks. A round
    of both factors leaves the cross terms of FedIT. The mean streams.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the server's rank exceeds the layer's smaller dimension.
        weights: ``size`` or ``uniform``.
        refactor: whether the factors are put into singular order; without it the rule is its mean.
        segments: average component j over the clients that trained it, instead of over all that trained the layer:
            what few clients train is not diluted, and single-factor rounds at unequal ranks are no longer exact.

    References:
        HRALoRA, CCGrid 2026.

    Note:
        Released code weighs clients by batches instead of examples, sets singular values below 1e-6 to zero in both
        factors, and re-factorises every layer: one that nobody has trained yet has B = 0, becomes A = B = 0 and never
        learns. It speaks of aggregation by SVD; the SVD re-factorises, and the mean of factors aggregates.
    """
    server = state.adapter.layers
    rows: Absent = "renormalise" if segments else "keep"
    mean = factor_mean(server, weighted(updates, weights), rows=rows)
    if refactor:
        mean = refactored(mean, rng)
    return with_layers(state, mean)


def refactored(layers: Mapping[str, LowRank], rng: np.random.Generator) -> dict[str, LowRank]:
    """The same deltas, scales and ranks, with components sorted by energy and the factors balanced.

    In float64, so that the only rounding is that of the result. The scale stays aside: ``B A`` is factorised, and
    ``scale * B A`` stays what it was.
    """
    found = compress_all({n: LowRank(x.A.double(), x.B.double()) for n, x in layers.items()}, split="balanced")
    wide = {name: pad(found[name], x.rank, rng) for name, x in layers.items()}
    return {name: LowRank(wide[name].A, wide[name].B, x.scale) for name, x in layers.items()}

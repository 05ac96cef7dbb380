"""RB-LoRA: every rank level is weighted by who owns it, in product space (Findings of EACL 2026)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from polyrank.core.compress import Matrix, compress
from polyrank.core.lowrank import LowRank, stack, tail
from polyrank.core.method import Positive
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import settle
from polyrank.methods.aggregate.sums import (
    Weights,
    factor_mean,
    weighted,
    with_layers,
)


def rb_lora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    space: Literal["product", "factor"] = "product",
    weights: Weights = "size",
    align: bool = False,
    rank: Positive | None = None,
) -> ServerState:
    """Averages rank level j over the clients that own it, and keeps the best approximation at the server's rank.

        D = sum_i s_i B_i diag(gamma_i) A_i,   gamma_ij = n_i / sum_{l: r_l > j} n_l        (product space)

    Averaging over everybody would shrink level j by the share of the data that owns it, every round, until high
    ranks die; gamma removes the shrinkage. The price: D is the mean of products only where ranks are equal.
    A level that nobody owns this round keeps the server's value.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh if the aggregate has fewer than the server's rank.
        space: ``product`` weights rank-one terms; ``factor`` averages rows of A and columns of B separately (RBLA)
            and then orders them by SVD.
        weights: n_i is the ``size`` of the client's data, or 1 (``uniform``).
        align: first rotate each client's factors into singular order. Levels then mean the same for everybody,
            and the result does not depend on how a client's factors are rotated.
        rank: the rank the server keeps from now on (None: as before).

    References:
        RB-LoRA, Findings of EACL 2026, pp. 1737-1746; raFLoRA (arXiv 2602.13486), which splits updates at the distinct
        ranks and averages each part over the clients that supply it, is the same in product space.

    Note:
        Released code never applies gamma, and redistributes with V where V^T is meant.
    """
    server = state.adapter.layers
    if space == "factor":
        return with_layers(state, settle(factor_mean(server, weighted(updates, weights)), server, rng, rank))
    kept = list(weighted(updates, weights))  # gamma is known once everybody's rank is
    balanced: dict[str, Matrix] = {}
    for name, held in server.items():
        owned = [(u.adapter.layers[name], w) for u, w in kept if name in u.adapter.layers]
        if sum(w for _, w in owned) > 0:
            balanced[name] = _balanced(owned, held, align)
    return with_layers(state, settle(balanced, server, rng, rank))


def rarity(ranks: Sequence[int], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """beta_j, the inverse of the share of the weight that owns level j: ``sum w / sum_{i: r_i > j} w_i``.

    A level that only clients without weight own has beta 0.

    >>> rarity([1, 2], [1.0, 3.0])
    array([1.        , 1.33333333])
    """
    w = np.asarray(weights, dtype=np.float64)
    owns = np.arange(max(ranks, default=0))[:, None] < np.asarray(ranks)
    owned = owns @ w
    beta: npt.NDArray[np.float64] = np.divide(w.sum(), owned, out=np.zeros_like(owned), where=owned > 0)
    return beta


def _balanced(owned: Sequence[tuple[LowRank, float]], server: LowRank, align: bool) -> LowRank:
    """``sum_i s_i B_i diag(gamma_i) A_i`` plus the server's levels that nobody owns, in factored form."""
    xs = [compress(x) if align else x for x, _ in owned]
    total = sum(w for _, w in owned)
    shares = [w / total for _, w in owned]
    beta = rarity([x.rank for x in xs], shares)
    levels = [
        LowRank(x.A, x.B * torch.from_numpy(w * beta[: x.rank]).to(x.B.device, x.B.dtype), x.scale)
        for x, w in zip(xs, shares, strict=True)
    ]
    return stack([*levels, tail(server, len(beta))])

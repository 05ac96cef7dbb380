"""Krum and Multi-Krum: the clients whose models are closest to the others' (NeurIPS 2017)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from torch import Tensor

from polyrank.core.method import Positive
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import settle
from polyrank.methods.aggregate.robust import Rows, change_products, finite, mean_of_changes, replaced
from polyrank.methods.aggregate.sums import Absent

Number = Annotated[int, Ge(0)]

_log = logging.getLogger(__name__)


def krum(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    byzantine: Number | None = None,
    keep: Positive = 1,
    few: Literal["refuse", "skip"] = "refuse",
    rows: Rows = "keep",
    layers: Absent = "renormalise",
) -> ServerState:
    """The mean of the `keep` clients whose whole models are closest to those of the others.

        score_i = sum of the n - f - 2 smallest || M_i - M_j ||_F^2,  j != i
        D = mean of D_i over the `keep` clients of the smallest score

    M_i is all that client i changed, in all layers and dense parameters together. Distances are those of products,
    exactly, from small Gram matrices of the factors; the mean is an exact sum of products, kept at the server's rank.
    Equal scores go to the smaller change. The clients that are kept answer for the head too.

    Holds against f clients among n >= 2 f + 3. A client that sends what is not finite is at an infinite distance.
    Unweighted by definition: a client could claim any number of examples.

    Cost: 2 (d_out + d_in) q^2 operations a layer in float64, q = sum r_i + R. Holds the cohort.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the result has fewer than the server's rank.
        byzantine: f, the clients that may send anything; None: as many as the round's n replies allow, (n - 3) / 2
            rounded down, none where fewer than 5 reply.
        keep: m, how many clients are averaged, at most n - f. 1 is Krum, more is Multi-Krum.
        few: what becomes of a round with fewer than 2 f + 3 replies: ``refuse`` stops the run, ``skip`` leaves the
            model as it is.
        rows: what a client counts as in rows beyond its rank: the server's (``keep``) or ``zero``.
        layers: what a client counts as in layers it does not hold. In distances it has not changed them, unless it
            counts as holding ``zero``.

    Raises:
        ValueError: if fewer than 2 f + 3 clients replied, and `few` is ``refuse``.

    References:
        Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
        arXiv 1703.02757.

    Note:
        The paper compares gradients of equal shape. With ``rows: zero`` clients of other ranks than the most are far
        away for their rank alone, and are never chosen.
    """
    cohort = list(updates)
    if not cohort:
        return state
    f = max((len(cohort) - 3) // 2, 0) if byzantine is None else byzantine
    if byzantine is not None and len(cohort) < 2 * f + 3:
        if few == "refuse":
            raise ValueError(_too_few(len(cohort), f))
        _log.warning("round %d: %s; the model stays as it is", state.round, _too_few(len(cohort), f))
        return replaced(state, {}, {})
    usable = [update for update in cohort if finite(update)]
    G = change_products(state, usable, rows, layers)
    chosen = closest(G, n=len(cohort), f=f, keep=keep)
    if not chosen:
        _log.warning("round %d: only %d of %d replies are finite", state.round, len(usable), len(cohort))
        return replaced(state, {}, {})
    alike = [1.0] * len(chosen)
    means, dense = mean_of_changes(state, [usable[i] for i in chosen], alike, alike, rows, layers)
    return replaced(state, settle(means, state.adapter.layers, rng), dense)


def closest(G: Tensor, n: int, f: int, keep: int) -> Sequence[int]:
    """The positions of the `keep` clients of the smallest scores, from the inner products of their changes.

        || M_i - M_j ||^2 = G_ii + G_jj - 2 G_ij

    >>> import torch
    >>> closest(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]), n=3, f=0, keep=2)
    [0, 1]

    Args:
        G: K x K, of the clients that sent finite values.
        n: how many replied, the others included, which are infinitely far away.
        f: how many may send anything.
        keep: how many to choose, at most n - f.

    Returns:
        Ascending positions; none where every client has too few others at a finite distance.
    """
    size = G.diagonal()
    distance = (size[:, None] + size - 2 * G).clamp(min=0).fill_diagonal_(math.inf).sort(dim=1).values
    near = max(n - f - 2, min(n - 1, 1))
    if near > max(len(G) - 1, 0):
        return []
    scores = distance[:, :near].sum(dim=1)
    order = np.lexsort((size.numpy(), scores.numpy()))
    return sorted(int(i) for i in order[: min(keep, n - f)])


def _too_few(replies: int, f: int) -> str:
    most = (replies - 3) // 2
    fewer = f"state byzantine: {most} or less" if most >= 0 else "do without byzantine"
    return (
        f"krum: {replies} clients replied, and byzantine: {f} needs 2 * {f} + 3 = {2 * f + 3} or more. Ask more "
        f"clients (cohort), {fewer}, or state few: skip, which leaves the model as it is in such a round"
    )

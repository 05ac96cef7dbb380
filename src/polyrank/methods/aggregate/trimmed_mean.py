"""Coordinate-wise trimmed means and medians of products, by blocks of rows (arXiv 1803.01498)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from polyrank.core import blockwise
from polyrank.core.blockwise import Approximation
from polyrank.core.lowrank import LowRank, precision
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import settle
from polyrank.methods.aggregate.robust import Rows, delta_of, dense_of, replaced
from polyrank.methods.aggregate.sums import Absent

Trim = Annotated[float, Ge(0), Lt(0.5)]

_log = logging.getLogger(__name__)


def trimmed_mean(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    trim: Trim = 0.2,
    rows: Rows = "keep",
    layers: Absent = "renormalise",
) -> ServerState:
    """Every entry of a layer's update is the mean of its clients' entries without the largest and the smallest.

        D_xy = mean of (D_1, ..., D_K)_xy without the b largest and the b smallest,   b = ceil(trim K)

    with ``D_i = s_i B_i A_i`` as `rows` has it, K the clients that count in the layer, and b never so large that
    nothing is left. What the server keeps is the best approximation of D at its rank: D itself has full rank, however
    small those of the clients are. Dense parameters likewise, entry by entry.

    Up to b clients may send anything, and what is no number counts as infinite. One or two clients cannot be trimmed:
    with ``layers: renormalise`` a layer that so few hold is theirs; with ``keep`` the others stand for what it was.

    Unweighted by definition: a client could claim any number of examples.

    The d_out x d_in matrix is never formed: see `polyrank.core.blockwise`. A pass makes all clients' entries, of
    2 (sum r_i) operations each, and 4 b K comparisons at most sort out which are trimmed. Holds the cohort.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the result has fewer than the server's rank.
        trim: the share that is cut off at either end, rounded up to whole clients.
        rows: what a client counts as in rows beyond its rank: the server's (``keep``) or ``zero``.
        layers: what a client counts as in layers it does not hold.

    References:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018.
        arXiv 1803.01498.

    Note:
        The paper takes the mean of gradients, entry by entry of the parameters. Entries of A and B of different clients
        have nothing in common; those of the products do.
    """
    return _coordinatewise(state, list(updates), rng, trim, rows, layers)


def median(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    rows: Rows = "keep",
    layers: Absent = "renormalise",
) -> ServerState:
    """Every entry of a layer's update is the median of its clients' entries.

        D_xy = median (D_1, ..., D_K)_xy

    of an even number, the mean of the two in the middle. As `trimmed_mean` with the largest b; the same holds of ranks,
    layers, dense parameters, weights and costs. Fewer than half of the clients may send anything.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: draws the rows that start fresh where the result has fewer than the server's rank.
        rows: what a client counts as in rows beyond its rank: the server's (``keep``) or ``zero``.
        layers: what a client counts as in layers it does not hold.

    References:
        Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018.
        arXiv 1803.01498.
    """
    return _coordinatewise(state, list(updates), rng, 0.5, rows, layers)


def _coordinatewise(
    state: ServerState, updates: Sequence[Update], rng: np.random.Generator, trim: float, rows: Rows, layers: Absent
) -> ServerState:
    server = state.adapter.layers
    found: dict[str, LowRank] = {}
    for name, held in server.items():
        if any(name in update.adapter.layers for update in updates):
            deltas = [delta_of(update.adapter.layers.get(name), held, rows, layers) for update in updates]
            best = robust_mean([x for x in deltas if x is not None], held.rank, trim)
            _log.debug("%s: the server's rank leaves %.3g of the norm", name, best.error)
            if math.isfinite(best.error):
                found[name] = best.x
            else:
                _log.warning("%s stays as it is: more clients than are trimmed sent what is not finite", name)
    return replaced(state, settle(found, server, rng), _dense(state.adapter.dense, updates, trim))


def _dense(server: Mapping[str, Tensor], updates: Sequence[Update], trim: float) -> dict[str, Tensor]:
    found = {}
    for name, held in server.items():
        sent = dense_of(name, updates)
        if sent:
            middle = middle_mean([tensor.to(precision(tensor)) for tensor in sent.values()], trim)
            found[name] = torch.where(middle.isfinite(), middle, held.double())
    return found


def robust_mean(xs: Sequence[LowRank], rank: int, trim: float) -> Approximation:
    """The best approximation of `rank` of the trimmed mean of ``delta(x)``, entry by entry, and its distance.

    Rows of the longer side are made block by block; which side is rows is nothing to the trimmed mean. The result is in
    no particular order.

    Args:
        xs: updates of one layer, of any ranks.
        rank: of the result.
        trim: the share that is cut off at either end; 0.5 is the median.
    """
    d_out, d_in = xs[0].shape
    dtype = precision(*(x.A for x in xs), *(x.B for x in xs))
    sides = [(x.B.to(dtype) * x.scale, x.A.to(dtype)) for x in xs]
    if d_out < d_in:
        sides = [(A.mT, B.mT) for B, A in sides]
    N, n = max(d_out, d_in), min(d_out, d_in)
    device = xs[0].A.device
    words = blockwise.BLOCK.get(device.type, blockwise.BLOCK["cpu"])
    height = max(words // (len(xs) * n), 1)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, N, height):
            yield middle_mean([left[start : start + height] @ right for left, right in sides], trim)

    best = blockwise.approximate(blocks, (N, n), rank, device)
    return best if d_out >= d_in else best._replace(x=LowRank(best.x.B.mT, best.x.A.mT))


def cut(clients: int, trim: float) -> int:
    """How many values are cut off at either end: the share, rounded up, while one or two in the middle are left.

    >>> [cut(k, 0.2) for k in (1, 2, 3, 5, 10, 11)], [cut(k, 0.5) for k in (4, 5)]
    ([0, 0, 1, 1, 2, 3], [1, 2])
    """
    return min(math.ceil(trim * clients - 1e-9), (clients - 1) // 2)


def middle_mean(values: list[Tensor], trim: float) -> Tensor:
    """The mean, in float64, of what is left of `values` at every entry; what is not a number counts as infinite.

    A bubble sort that stops once the ends are in place: an elementwise minimum and maximum a comparison, which for few
    clients is several times as fast as sorting.
    """
    values = [torch.nan_to_num(value, nan=math.inf, posinf=math.inf, neginf=-math.inf) for value in values]
    low, high = 0, len(values)
    for _ in range(cut(len(values), trim)):
        for i in range(low, high - 1):
            values[i], values[i + 1] = _ordered(values[i], values[i + 1])
        high -= 1
        for i in range(high - 1, low, -1):
            values[i - 1], values[i] = _ordered(values[i - 1], values[i])
        low += 1
    total = values[low].double()
    for value in values[low + 1 : high]:
        total = total + value
    return total / (high - low)


def _ordered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(x, y), torch.maximum(x, y)

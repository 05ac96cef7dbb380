"""What the rules in product space share: exact sums of products that stream, and what the server keeps of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from polyrank.core.compress import Matrix, compress_all
from polyrank.core.lowrank import Adapter, LowRank, combine, pad, precision, rescale
from polyrank.core.running import RunningSum
from polyrank.core.types import Update
from polyrank.methods.aggregate.sums import Absent


class Products:
    """For every layer the weighted mean of the updates' products, as updates stream past.

    A row that a client lacks adds nothing to its product, unless `rows` is ``keep``: then the server's row counts. No
    update is held; a layer needs no more memory than its d_out x d_in matrix, however many clients there are.

    Args:
        server: the server's layers.
        layers: what a client counts as that does not hold the layer.
        rows: what a client counts as in rows beyond its rank; ``keep`` is right where it ran the server's, frozen.
    """

    def __init__(self, server: Mapping[str, LowRank], layers: Absent, rows: Absent = "zero") -> None:
        self.server, self.layers, self.rows = server, layers, rows
        self.sums = {name: RunningSum(x.shape) for name, x in server.items()}
        self.mass = dict.fromkeys(server, 0.0)
        self.share = {name: torch.zeros(x.rank, dtype=torch.float64) for name, x in server.items()}
        self.all = 0.0

    def watch(self, updates: Iterable[tuple[Update, float]]) -> Iterator[tuple[Update, float]]:
        """The updates, each added as it passes."""
        for update, weight in updates:
            self.all += weight
            for name in self.server:
                if weight > 0 and name in update.adapter.layers:
                    x = update.adapter.layers[name]
                    self.sums[name].add(x, weight)
                    self.mass[name] += weight
                    self.share[name][x.rank :] += weight * (self.rows == "keep")
            yield update, weight

    def finish(self) -> dict[str, Matrix]:
        """The mean of every layer that somebody holds: factors, or the matrix where that is smaller."""
        means: dict[str, Matrix] = {}
        for name, held in self.server.items():
            mass = self.mass[name]
            if mass > 0:
                lacking = (self.all - mass) * (self.layers == "keep")
                share = self.share[name] + lacking
                if share.any():
                    share = share.to(held.B.device, precision(held.B))
                    self.sums[name].add(LowRank(held.A, held.B * share, held.scale), 1.0)
                means[name] = self.sums[name].total(mass if self.layers == "renormalise" else self.all)
        return means


def products(
    server: Mapping[str, LowRank], updates: Iterable[tuple[Update, float]], layers: Absent, rows: Absent = "zero"
) -> dict[str, Matrix]:
    """The exact weighted mean of products of every layer that somebody holds, one update at a time; see `Products`."""
    sums = Products(server, layers, rows)
    for _ in sums.watch(updates):
        pass
    return sums.finish()


def settle(
    layers: Mapping[str, Matrix], server: Mapping[str, LowRank], rng: np.random.Generator, rank: int | None = None
) -> dict[str, LowRank]:
    """The best approximation of every layer at the server's rank (or `rank`), under the server's scale.

    A layer with less room than `rank` has what it has room for. Rows are ordered by energy. If a layer has fewer rows
    than that, the rest start fresh, so that they can learn.
    """
    ranks = {name: server[name].rank if rank is None else min(rank, *server[name].shape) for name in layers}
    best = compress_all(layers, ranks)
    return {name: rescale(pad(x, ranks[name], rng), server[name].scale) for name, x in best.items()}


def fold(folded: Adapter, residuals: Mapping[str, LowRank]) -> Adapter:
    """The frozen part with `residuals` added, exactly. Never of a rank above the layer's smaller dimension."""
    grown = combine([folded, Adapter(residuals)])
    over = {name: x for name, x in grown.layers.items() if x.rank > min(x.shape)}
    return Adapter({**grown.layers, **compress_all(over)}, grown.dense)

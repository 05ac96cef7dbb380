"""What the rules share: weights, what clients may lack, and means of factors that stream.

A rule must say what becomes of a row or a layer that some clients do not hold. Three words cover the field:

    renormalise   it is averaged over those that hold it (RBLA, RB-LoRA, LEGEND); the default
    zero          who lacks it counts as holding zeros (HetLoRA's zero padding)
    keep          who lacks it counts as holding the server's value (HRALoRA, Fed-HeLLo)

A row or a layer that nobody holds keeps the server's value, whatever the word: zeroed on both sides, it could
never learn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch

from polyrank.core.compress import compress
from polyrank.core.lowrank import Adapter, Factors, LowRank, pad, precision, rescale, zeros
from polyrank.core.types import ServerState, Update

Absent = Literal["renormalise", "zero", "keep"]
Weights = Literal["size", "uniform"]


def weighted(updates: Iterable[Update], weights: Weights) -> Iterator[tuple[Update, float]]:
    """Each update with its unnormalised weight: its examples, or 1.

    Clients without examples have no weight by size, unless no client has any: then all weigh the same.
    """
    held: list[Update] = []
    sized = False
    for update in updates:
        if weights == "uniform":
            yield update, 1.0
        elif update.examples > 0:
            sized = True
            yield update, float(update.examples)
        elif not sized:
            held.append(update)
    if not sized:
        yield from ((update, 1.0) for update in held)


LayerWeight = Callable[[LowRank, float], float]


def factor_mean(
    server: Mapping[str, LowRank],
    updates: Iterable[tuple[Update, float]],
    *,
    rows: Absent = "renormalise",
    layers: Absent = "renormalise",
    layer_weight: LayerWeight = lambda x, w: w,
) -> dict[str, LowRank]:
    """The row-wise weighted mean of raw factors, one update at a time; memory does not grow with the cohort.

    Row j of A (and column j of B) becomes ``sum_i w_i A_i[j] / sum_i w_i`` over the clients i that hold it, and,
    by `rows` and `layers`, over those that do not. Factors are first written under the server's scale, half of the
    ratio on each side. A factor that nobody trained is the server's. Layers that nobody holds are left out.

    Args:
        server: the server's layers.
        updates: updates with their weights.
        rows: what a client counts as that holds the layer at a lower rank.
        layers: what a client counts as that does not hold the layer.
        layer_weight: a layer's weight, from the client's layer (under its own scale) and the client's weight; where
            a client lacks the layer, from what `layers` says it counts as holding.
    """
    sums = {name: _Sum(x) for name, x in server.items()}
    implied = dict(server) if layers == "keep" else {name: zeros(x.shape, 0) for name, x in server.items()}
    for update, weight in updates:
        for name, s in sums.items():
            if name in update.adapter.layers:
                x = update.adapter.layers[name]
                s.add(x, layer_weight(x, weight), update.factors)
            elif layers != "renormalise":
                s.lack += layer_weight(implied[name], weight)
    return {name: s.mean(rows, layers) for name, s in sums.items() if s.holders > 0}


class _Sum:
    """Running sums of one layer: weighted factors, and the weight that each row received."""

    def __init__(self, server: LowRank) -> None:
        self.server = server
        self.layer = LowRank(torch.zeros_like(server.A), torch.zeros_like(server.B), server.scale)
        self.rows = torch.zeros(server.rank, dtype=torch.float64)
        self.holders = 0.0
        self.lack = 0.0
        self.trained = ""

    def add(self, x: LowRank, weight: float, factors: Factors) -> None:
        dtype = precision(self.layer.A, self.layer.B, x.A, x.B)
        x = rescale(LowRank(x.A.to(dtype), x.B.to(dtype), x.scale), self.server.scale, fold="both")
        grown = max(x.rank, self.layer.rank)
        before, term = pad(self.layer, grown), pad(x, grown)
        self.layer = LowRank(before.A + term.A * weight, before.B + term.B * weight, x.scale)
        rows = torch.zeros(grown, dtype=torch.float64)
        rows[: self.rows.numel()] = self.rows
        rows[: x.rank] += weight
        self.rows, self.holders = rows, self.holders + weight
        self.trained += factors

    def mean(self, rows: Absent, layers: Absent) -> LowRank:
        lack_row = self.holders - self.rows
        kept = lack_row * (rows == "keep") + self.lack * (layers == "keep")
        weight = self.rows + lack_row * (rows != "renormalise") + self.lack
        nobody = self.rows <= 0
        kept, weight = torch.where(nobody, 1.0, kept), torch.where(nobody, 1.0, weight)
        held = pad(self.server, self.rows.numel())
        dtype = self.layer.A.dtype
        device = self.layer.A.device
        keep, per = (kept / weight).to(device, dtype), (1.0 / weight).to(device, dtype)
        A = self.layer.A * per[:, None] + held.A.to(dtype) * keep[:, None]
        B = self.layer.B * per + held.B.to(dtype) * keep
        if "A" not in self.trained:
            A = torch.cat([self.server.A.to(dtype), A[self.server.rank :]])
        if "B" not in self.trained:
            B = torch.cat([self.server.B.to(dtype), B[:, self.server.rank :]], dim=1)
        return _at_server_rank(LowRank(A, B, self.server.scale), self.server)


def _at_server_rank(x: LowRank, server: LowRank) -> LowRank:
    """Rows beyond the server's rank (a client may hold more) are folded into the best approximation of its rank."""
    if x.rank <= server.rank:
        return x
    return rescale(compress(x, server.rank), server.scale)


def with_layers(state: ServerState, layers: Mapping[str, LowRank]) -> ServerState:
    """The state with these layers replaced, in the server's order, precision and (row-major) layout."""
    current = state.adapter.layers
    merged = {
        name: LowRank(new.A.to(held.A.dtype).contiguous(), new.B.to(held.B.dtype).contiguous(), new.scale)
        for name, held in current.items()
        for new in [layers.get(name, held)]
    }
    return replace(state, adapter=Adapter(merged, state.adapter.dense))

"""What robust rules share: clients' changes in product space, and answers for dense parameters too.

A client's change of a layer is what it sends less what it stands for, in rank-one terms of both:

    change_i = s_i B_i A_i - s sum_{j covered} B[:, j] A[j]

Of the server's rows a client covers the first r_i with ``rows: keep``, so that a low rank is no change of the rest, and
all of them with ``rows: zero``. A layer that it lacks it has not changed, unless ``layers: zero`` says that it sends
zeros. The server plus the mean of changes is then the mean of products, as the words `rows` and `layers` have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from polyrank.core.factorise import row_gram
from polyrank.core.lowrank import Adapter, LowRank, precision, stack, tail, trim, truncate
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.sums import Absent, with_layers

Rows = Literal["keep", "zero"]


def delta_of(x: LowRank | None, server: LowRank, rows: Rows, layers: Absent) -> LowRank | None:
    """What a client counts as holding of a layer of which it sent `x`; None where it does not count."""
    if x is None:
        return {"renormalise": None, "zero": truncate(server, 0), "keep": server}[layers]
    return stack([x, tail(server, x.rank)]) if rows == "keep" and x.rank < server.rank else x


def replaced(state: ServerState, layers: Mapping[str, LowRank], dense: Mapping[str, Tensor]) -> ServerState:
    """The state with these layers and dense parameters.

    The rule answers for all dense parameters: they are new tensors, also those that stay as they are, so that `absorb`
    averages none.
    """
    merged = with_layers(state, layers)
    held = {name: dense.get(name, tensor).to(tensor.dtype, copy=True) for name, tensor in state.adapter.dense.items()}
    return replace(merged, adapter=Adapter(merged.adapter.layers, held))


def dense_of(name: str, updates: Sequence[Update]) -> dict[int, Tensor]:
    """The parameter as it was sent, by position among the updates."""
    return {i: update.adapter.dense[name] for i, update in enumerate(updates) if name in update.adapter.dense}


def finite(update: Update) -> bool:
    """Whether all that was sent is finite in float32, so that no sum of products overflows in float64."""
    layers = update.adapter.layers.values()
    tensors = [t for x in layers for t in (x.A, x.B, torch.tensor(x.scale))] + list(update.adapter.dense.values())
    return all(bool(tensor.float().isfinite().all()) for tensor in tensors)


def change_products(state: ServerState, updates: Sequence[Update], rows: Rows, layers: Absent) -> Tensor:
    """The inner products of what clients changed, over all layers and dense parameters.

        G_ij = sum_l < change_i, change_j >_F + sum_p < t_i - t, t_j - t >

    From factors alone, in float64: with all rank-one terms of a layer stacked (the server's once) and C the
    coefficients of each client, ``C ((B^T B) * (A A^T)) C^T``, at (d_out + d_in) q^2 operations a layer for q terms.

    Returns:
        K x K, on the CPU.
    """
    G = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name, held in state.adapter.layers.items():
        G += _layer_products(held, [update.adapter.layers.get(name) for update in updates], rows, layers).cpu()
    for name, tensor in state.adapter.dense.items():
        given = dense_of(name, updates)
        if given:
            moved = torch.stack([(t.double() - tensor.double()).flatten() for t in given.values()])
            at = torch.tensor(list(given))
            G[at[:, None], at] += moved @ moved.mT
    return (G + G.mT) / 2


def _layer_products(held: LowRank, sent: Sequence[LowRank | None], rows: Rows, layers: Absent) -> Tensor:
    terms = [held, *(x for x in sent if x is not None)]
    A, B = torch.cat([x.A.double() for x in terms]), torch.cat([x.B.double() for x in terms], dim=1)
    C = A.new_zeros(len(sent), len(A))
    start = held.rank
    for i, x in enumerate(sent):
        C[i, : held.rank] = -held.scale * _covered(x, held, rows, layers)
        if x is not None:
            C[i, start : start + x.rank] = x.scale
            start += x.rank
    return C @ (row_gram(B.mT) * row_gram(A)) @ C.mT


def _covered(x: LowRank | None, server: LowRank, rows: Rows, layers: Absent) -> Tensor:
    """1 for the server's rows that a client's update stands for, 0 for those that it leaves as they are."""
    everything = (layers if x is None else rows) == "zero"
    covered = server.rank if everything else 0 if x is None else x.rank
    return (torch.arange(server.rank, device=server.A.device) < covered).double()


def mean_of_changes(
    state: ServerState,
    updates: Sequence[Update],
    weights: Sequence[float],
    factors: Sequence[float],
    rows: Rows,
    layers: Absent,
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """What the server holds, plus the weighted mean of what clients changed, each times a factor of its own.

        D = sum_i p_i (S + c_i change_i),   p_i = w_i / sum w,   per layer over the clients that count there

    In factored form. Layers and dense parameters that nobody sent are left out.

    Args:
        state: the server's state.
        updates: updates of finite values.
        weights: w_i, more than 0.
        factors: c_i, at most 1.
        rows: what a client counts as in rows beyond its rank.
        layers: what a client counts as in layers it does not hold.
    """
    means = {}
    for name, held in state.adapter.layers.items():
        sent = [update.adapter.layers.get(name) for update in updates]
        counted = [i for i, x in enumerate(sent) if x is not None or layers != "renormalise"]
        if any(x is not None for x in sent):
            total = sum(weights[i] for i in counted)
            shares = {i: weights[i] / total for i in counted}
            means[name] = _layer_mean(held, sent, shares, factors, rows, layers)
    dense = {}
    for name, tensor in state.adapter.dense.items():
        given = dense_of(name, updates)
        if given:
            total = sum(weights[i] for i in given)
            moves = [(t.double() - tensor.double()) * (weights[i] / total * factors[i]) for i, t in given.items()]
            dense[name] = tensor.double() + torch.stack(moves).sum(dim=0)
    return means, dense


def _layer_mean(
    held: LowRank,
    sent: Sequence[LowRank | None],
    shares: Mapping[int, float],
    factors: Sequence[float],
    rows: Rows,
    layers: Absent,
) -> LowRank:
    """One layer's mean: what clients sent, and of the server's rows what was not replaced.

    Without pairs that contribute nothing, as the server's have not before they are trained: no decomposition can tell
    their directions from one another, so which it found would follow from rounding.
    """
    left = torch.zeros(held.rank, dtype=torch.float64, device=held.A.device)
    parts: list[LowRank] = []
    for i, share in shares.items():
        left += share * (1 - factors[i] * _covered(sent[i], held, rows, layers))
        if (x := sent[i]) is not None:
            parts.append(_shrunk(x, share * factors[i]))
    kept = LowRank(held.A, held.B * left.to(held.B.dtype), held.scale)
    return trim(stack([kept, *parts]))


def _shrunk(x: LowRank, factor: float) -> LowRank:
    """``factor * delta(x)``, its pairs balanced, |b_j| = |a_j|: factors of any size end in the range of their dtype."""
    A, B = x.A.double(), x.B.double() * math.copysign(1.0, x.scale)
    a, b = A.norm(dim=1), B.norm(dim=0)
    root = math.sqrt(factor * abs(x.scale))
    up = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
    dtype = precision(x.A, x.B)
    return LowRank((A * (up * root)[:, None]).to(dtype), (B / up * root).to(dtype))

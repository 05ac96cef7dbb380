"""HetLoRA: zero-padded factors, averaged with weights by norm, size or none (EMNLP 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from polyrank.core.lowrank import LowRank, norm
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.sums import Absent, factor_mean, weighted, with_layers


def hetlora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Literal["norm", "size", "uniform"] = "norm",
    rows: Absent = "zero",
    layers: Absent = "renormalise",
    pruning: bool = False,
) -> ServerState:
    """Zero-pads factors to the server's rank and averages them; weights from the norms of the updates.

        A = sum w_i pad(A_i),   B = sum w_i pad(B_i),   w_i = ||s_i B_i A_i||_F / sum_k ||s_k B_k A_k||_F

    per layer. Not exact: cross terms, and rows that only a share rho of the weight owns shrink by rho in each
    factor. The norms come from two r x r Gram matrices, never from the product.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: unused.
        weights: ``norm`` (the paper's sparsity weighting), ``size`` or ``uniform``.
        rows: what a client counts as in rows beyond its rank; the paper pads with zeros.
        layers: what a client counts as in layers it does not hold.
        pruning: remember the ranks that clients have pruned themselves to, and plan no more than those.

    References:
        Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. arXiv 2401.06432.

    Note:
        With unequal scales the paper's norm of B_i A_i would compare factors of different meaning; the scale is
        part of the norm here.
    """
    ranks = dict(state.memory.get("ranks", {}))

    def watched() -> Iterator[Update]:
        for update in updates:
            held = {name: x.rank for name, x in update.adapter.layers.items()}
            ranks[update.client] = {**ranks.get(update.client, {}), **held}
            yield update

    stream = weighted(watched(), "uniform" if weights == "norm" else weights)
    layer_weight = _norm_weight if weights == "norm" else _given
    mean = factor_mean(state.adapter.layers, stream, rows=rows, layers=layers, layer_weight=layer_weight)
    memory = {**state.memory, "ranks": ranks} if pruning and ranks else state.memory
    return with_layers(replace(state, memory=memory), mean)


def _given(x: LowRank, weight: float) -> float:
    return weight


def _norm_weight(x: LowRank, weight: float) -> float:
    return norm(x) + 1e-30  # all-zero updates weigh the same, instead of 0 / 0

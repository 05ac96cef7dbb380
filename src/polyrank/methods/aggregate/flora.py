"""FLoRA: the stacked updates are folded into the model, and adapters start afresh (arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from polyrank.core.lowrank import fresh
from polyrank.core.running import factored
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import fold, products
from polyrank.methods.aggregate.sums import Absent, Weights, weighted, with_layers


def flora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    layers: Absent = "renormalise",
) -> ServerState:
    """Stacks all factors, which is exact at any ranks, folds the stack, and restarts every adapter.

        W <- W + [B_1 ... B_K] [p_1 s_1 A_1; ...; p_K s_K A_K],   A <- fresh,   B <- 0

    The base is never written to: the fold is a second, frozen adapter that travels with the state (so a late joiner
    has it, and quantised bases work). Its rank grows by sum r_i a round, up to the layer's smaller dimension. Heads
    are averaged and not restarted.

    References:
        Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations.
        arXiv 2409.05976.
    """
    means = products(state.adapter.layers, weighted(updates, weights), layers)
    folded = fold(state.folded, {name: factored(x) for name, x in means.items()})
    restarted = {
        name: fresh(x.shape, x.rank, x.scale, rng) for name, x in state.adapter.layers.items() if name in means
    }
    return with_layers(replace(state, folded=folded), restarted)

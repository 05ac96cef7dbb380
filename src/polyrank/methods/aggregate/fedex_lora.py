"""FedEx-LoRA: FedIT, with what it gets wrong folded into the model (arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from polyrank.core.lowrank import stack
from polyrank.core.running import factored
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import Products, fold
from polyrank.methods.aggregate.sums import (
    Absent,
    Weights,
    factor_mean,
    weighted,
    with_layers,
)


def fedex_lora(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "uniform",
    rows: Absent = "renormalise",
    layers: Absent = "renormalise",
) -> ServerState:
    """The mean of the factors, and the residual to the mean of the products as a frozen fold.

        A = mean A_i,   B = mean B_i,   W <- W + (mean s_i B_i A_i - s B A)

    so that W + s B A is exact. The residual is kept in factored form, of rank at most sum r_i + r, and is never
    written into the base. Where clients compute with the whole adapter (``dispatch: whole``), what they lack counts as
    the server's: with ``rows`` and ``layers`` at ``keep`` the mean of their models is exact at unequal ranks too.

    References:
        Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models.
        arXiv 2410.09432.

    Note:
        Weights are uniform, as published. Released code adds the transpose of the residual to square layers.
    """
    server = state.adapter.layers
    sums = Products(server, layers, rows)
    mean = factor_mean(server, sums.watch(weighted(updates, weights)), rows=rows, layers=layers)
    state = with_layers(state, mean)
    exact = {name: factored(x) for name, x in sums.finish().items()}
    residuals = {name: stack([x, state.adapter.layers[name]], [1.0, -1.0]) for name, x in exact.items()}
    return replace(state, folded=fold(state.folded, residuals))

"""LoRA-FAIR: FedIT, with B corrected towards the exact mean of products (arXiv 2411.14961)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from polyrank.core.compress import Matrix
from polyrank.core.lowrank import LowRank
from polyrank.core.types import ServerState, Update
from polyrank.methods.aggregate.products import Products
from polyrank.methods.aggregate.sums import (
    Absent,
    Weights,
    factor_mean,
    weighted,
    with_layers,
)


def lora_fair(
    state: ServerState,
    updates: Iterable[Update],
    rng: np.random.Generator,
    *,
    weights: Weights = "size",
    rows: Absent = "renormalise",
    layers: Absent = "renormalise",
    ridge: float = 1e-3,
) -> ServerState:
    """The mean of the factors, and the correction of B that brings the product closest to the exact mean.

        dB = (D / s - B A) A^T (A A^T + lambda I)^-1,   D = sum p_i s_i B_i A_i

    an r x r solve in float64 on factors. Not exact: only the part of D in the row space of A can be reached.

    Args:
        state: the server's state.
        updates: the clients' updates.
        rng: unused.
        weights: ``size`` or ``uniform``.
        rows: what a client counts as in rows beyond its rank.
        layers: what a client counts as in layers it does not hold.
        ridge: lambda, relative to the mean of the diagonal of A A^T; keeps the correction small.

    References:
        Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement.
        arXiv 2411.14961.

    Note:
        The paper minimises a similarity by gradient steps; this is its closed form for the squared Frobenius norm.
    """
    server = state.adapter.layers
    sums = Products(server, layers, rows)
    mean = factor_mean(server, sums.watch(weighted(updates, weights)), rows=rows, layers=layers)
    return with_layers(state, {name: _corrected(mean[name], x, ridge) for name, x in sums.finish().items()})


def _corrected(mean: LowRank, exact: Matrix, ridge: float) -> LowRank:
    A, B = mean.A.double(), mean.B.double()
    gram = A @ A.T
    level = float(gram.diagonal().mean()) if mean.rank else 0.0
    if not level > 0:
        return mean
    reached = exact.B.double() @ (exact.A.double() @ A.T) if isinstance(exact, LowRank) else exact.double() @ A.T
    target = reached / mean.scale  # D A^T / s
    damped = gram + ridge * level * torch.eye(mean.rank, dtype=gram.dtype, device=gram.device)
    step = torch.linalg.solve(damped, (target - B @ gram).T).T
    return LowRank(mean.A, (B + step).to(mean.B.dtype), mean.scale)

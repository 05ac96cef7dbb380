"""How far a round's aggregate is from the exact mean of what its clients' models compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from polyrank.core.lowrank import LowRank, stack
from polyrank.core.types import Client, ServerState, Task, Update

Parts = list[tuple[LowRank, float]]
"""Updates of one layer with weights: their weighted sum, unevaluated."""


def aggregation_error(
    before: ServerState, after: ServerState, tasks: Mapping[Client, Task], updates: Sequence[Update]
) -> float:
    """The relative Frobenius gap between the server's new model and the weighted mean of its clients' models.

        || new - exact ||_F / || exact - old ||_F,   over all layers together

        exact = sum_k p_k (U_k + F_k),   p_k = n_k / sum n,   in every layer over the clients that hold it

    U_k is the delta the client trained, F_k that of what it only ran in this layer (``task.frozen``: folds, and rows
    that it carried); ``old`` and ``new`` are the deltas of the server's adapter and fold together. So what a rule folds
    counts as part of its result. A client that sends no update of a layer is not counted there, even if it ran the
    layer frozen; a layer that nobody with weight holds is left out. As in the rules, clients without examples have no
    weight unless nobody has any. The weights are by size whatever the rule's are.

    0 is exact; 1 is as far from the exact mean as a server that had ignored the round. Where clients ran less than the
    server's model (``dispatch: truncate``), their mean lacks what they lacked, and a rule that keeps it has an error.

    Computed in float64 from the factors: those of both sides are stacked, and the norm of the stack's product is taken
    through the QR decompositions of the stacks, so that a small difference is not lost as it would be between the Gram
    matrices of large sums. What remains for an exact rule is the rounding of the new state, about 1e-7 of ``new`` in
    float32, divided by the change.

    Args:
        before: the server's state as tasks were planned.
        after: the state that the updates were made into.
        tasks: the tasks of the round.
        updates: its updates.

    Returns:
        The error; 0 where the exact change is no more than the rounding of ``old`` in float32, and 1 where an update
        is not finite, as in the limit of an update that grows without bound beside a model that stays.
    """
    weights = _weights(updates)
    gap = change = size = 0.0
    for name in after.adapter.layers:
        exact = _mean_model(name, tasks, updates, weights)
        if exact:
            old, new = _model(name, before), _model(name, after)
            gap = math.hypot(gap, _distance(new, exact))
            change = math.hypot(change, _distance(exact, old))
            size = math.hypot(size, _distance(old, []))
    if not math.isfinite(change):
        return 1.0
    return gap / change if change > torch.finfo(torch.float32).eps * size else 0.0


def _weights(updates: Iterable[Update]) -> dict[Client, float]:
    sizes = {update.client: float(update.examples) for update in updates}
    return sizes if any(size > 0 for size in sizes.values()) else dict.fromkeys(sizes, 1.0)


def _model(name: str, state: ServerState) -> Parts:
    return [(part.layers[name], 1.0) for part in (state.adapter, state.folded) if name in part.layers]


def _mean_model(
    name: str, tasks: Mapping[Client, Task], updates: Sequence[Update], weights: Mapping[Client, float]
) -> Parts:
    """The mean of the holders' models in one layer; empty where there are none."""
    holders = [u for u in updates if name in u.adapter.layers and weights[u.client] > 0]
    total = sum(weights[u.client] for u in holders)
    trained = [(u.adapter.layers[name], weights[u.client] / total) for u in holders]
    frozen: Parts = []
    for update in holders:
        if name in tasks[update.client].frozen.layers:
            _add(frozen, tasks[update.client].frozen.layers[name], weights[update.client] / total)
    return trained + frozen


def _add(parts: Parts, x: LowRank, weight: float) -> None:
    """Adds `x`, once for all clients that ran the same: a fold is the largest of all."""
    for i, (y, sum_) in enumerate(parts):
        if x is y or (x.scale == y.scale and torch.equal(x.A, y.A) and torch.equal(x.B, y.B)):
            parts[i] = y, sum_ + weight
            return
    parts.append((x, weight))


def _distance(left: Parts, right: Parts) -> float:
    """The Frobenius norm of ``sum w x`` over `left` minus that over `right`."""
    terms = left + [(x, -weight) for x, weight in right]
    if not terms:
        return 0.0
    wide = [LowRank(x.A.double(), x.B.double(), x.scale) for x, _ in terms]
    difference = stack(wide, [weight for _, weight in terms])
    return float(torch.linalg.vector_norm(_triangle(difference.B) @ _triangle(difference.A.T).T))


def _triangle(M: Tensor) -> Tensor:
    """R of ``M = Q R`` for a tall M; M itself where that is no smaller."""
    return torch.linalg.qr(M, mode="r").R if M.shape[0] > M.shape[1] else M

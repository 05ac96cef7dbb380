"""What can each client afford? Estimators turn profiles into rank budgets.

A budget is the sum of ranks over the adapted modules, so rank r on all of m modules is a budget of r * m.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyrank.core.method import Estimate, Positive
from polyrank.core.types import Budget, Client, ClientProfile, LocalTraining, ModelSpec


def fixed(
    profiles: Mapping[Client, ClientProfile],
    spec: ModelSpec,
    local: LocalTraining,
    *,
    rank: Positive | None = None,
) -> dict[Client, Budget]:
    """The rank each client states, or one rank for all, on every module.

    Args:
        profiles: what the clients report.
        spec: the adapted modules.
        local: how clients train.
        rank: rank per module for every client; None takes each profile's own `rank`.

    Raises:
        ValueError: if a client states no rank and `rank` is None.
    """
    budgets = {}
    for client, profile in profiles.items():
        own = profile.rank if rank is None else rank
        if own is None:
            raise ValueError(f"client {client!r} states no rank; give fleet[].rank or method.estimate.rank")
        budgets[client] = Budget(own * len(spec.modules), own, "stated")
    return budgets


ESTIMATORS: dict[str, Estimate] = {
    "fixed": fixed,
}

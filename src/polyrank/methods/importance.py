"""Which layers matter? Scorers give every layer a non-negative importance."""

from __future__ import annotations

from polyrank.core.method import Score
from polyrank.core.types import ModelSpec, ServerState


def alike(spec: ModelSpec, state: ServerState) -> dict[str, float]:
    """Every layer matters as much as any other."""
    return dict.fromkeys(spec.modules, 1.0)


SCORERS: dict[str, Score] = {
    "alike": alike,
}

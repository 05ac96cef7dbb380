"""What does a client train this round? Schedules name the factors."""

from __future__ import annotations

from typing import Literal

from polyrank.core.lowrank import Factors
from polyrank.core.method import Schedule


def both(round_: int) -> Factors:
    """A and B, every round."""
    return "AB"


def only_a(round_: int) -> Factors:
    """A only; B stays as the server has it."""
    return "A"


def only_b(round_: int) -> Factors:
    """B only; A stays as the server has it (FFA-LoRA, arXiv 2403.12313)."""
    return "B"


def alternating(round_: int, *, first: Literal["A", "B"] = "B", warmup: int = 0) -> Factors:
    """One factor a round, in turn, after `warmup` rounds of both (RoLoRA, arXiv 2409.02346; HRALoRA).

    With A shared by all clients, averaging B averages the products exactly, and the other way round.
    """
    if round_ < warmup:
        return "AB"
    if (round_ - warmup) % 2 == 0:
        return first
    return "A" if first == "B" else "B"


SCHEDULES: dict[str, Schedule] = {
    "alternating": alternating,
    "both": both,
    "only_a": only_a,
    "only_b": only_b,
}

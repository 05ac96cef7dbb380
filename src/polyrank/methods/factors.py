"""What does a client train this round? Schedules name the factors."""

from __future__ import annotations

from typing import Literal

from polyrank.core.lowrank import Factors
from polyrank.core.method import Positive, Schedule


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


def warm_up(
    round_: int, *, rounds: Positive = 20, then: Literal["alternating", "only_a", "only_b"] = "alternating"
) -> Factors:
    """Both factors for the first `rounds` rounds, and then another schedule from its beginning (HRALoRA).

    HRALoRA, CCGrid 2026, warms up for 20 rounds and alternates, or trains B only in its ablation.
    """
    if round_ < rounds:
        return "AB"
    schedules: dict[str, Schedule] = {"alternating": alternating, "only_a": only_a, "only_b": only_b}
    return schedules[then](round_ - rounds)


SCHEDULES: dict[str, Schedule] = {
    "alternating": alternating,
    "both": both,
    "only_a": only_a,
    "only_b": only_b,
    "warm_up": warm_up,
}

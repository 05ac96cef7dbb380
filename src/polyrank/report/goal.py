"""What runs are compared by: accuracy, or nats per token where they are of language models (`local.evaluate.worth`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Goal:
    """A figure, and which end of it is better.

    Attributes:
        key: in metrics.
        name: for example in ``test accuracy``.
        axis: the name with its unit, for axes.
        own: the axis of clients' own figures.
        title: as the head of a column.
        kind: how its numbers are written, in tables and on axes.
        better: ``high`` or ``low``.
        than: what is said of a better one, and of a worse one.
    """

    key: str
    name: str
    axis: str
    own: str
    title: str
    kind: Literal["percent", "nats"]
    better: Literal["high", "low"]
    than: tuple[str, str]

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.better == "high" else -1

    @property
    def scale(self) -> Literal["number", "percent"]:
        """How an axis writes it."""
        return "percent" if self.kind == "percent" else "number"

    def gap(self, difference: float) -> str:
        """A difference for people: ``+1.20 points``."""
        text = f"{100 * difference:+.2f} points" if self.kind == "percent" else f"{difference:+.3f} nats"
        return text.replace("-", "\N{MINUS SIGN}")


ACCURACY = Goal(
    key="accuracy",
    name="accuracy",
    axis="accuracy",
    own="accuracy on own held-out data",
    title="accuracy",
    kind="percent",
    better="high",
    than=("above", "below"),
)
NATS = Goal(
    key="loss",
    name="loss",
    axis="loss, nats per token",
    own="nats per token on own held-out data",
    title="nats per token",
    kind="nats",
    better="low",
    than=("better than", "worse than"),
)


def goal_of(metrics: Mapping[str, Any] | None, prefix: str = "") -> Goal:
    """What decides between models with these metrics: those of language models have a perplexity."""
    return NATS if metrics and f"{prefix}perplexity" in metrics else ACCURACY

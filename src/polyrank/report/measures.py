"""What is measured of a run: single numbers, and their mean and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from polyrank.report.gather import Entry
from polyrank.report.records import Recorded, of_clients


@dataclass(frozen=True)
class Value:
    """A mean over seeds.

    Attributes:
        mean: of the seeds that have a value.
        spread: their sample standard deviation; None for one seed.
        single: the values.
        note: what to know about it, for example ``predicted``.
    """

    mean: float
    spread: float | None
    single: tuple[float, ...]
    note: str = ""


def over_seeds(values: Iterable[float | None], note: str = "") -> Value | None:
    """Mean and sample standard deviation of what is there; None where nothing is."""
    known = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Value(float(np.mean(known)), spread, known, note)


def of_summary(run: Recorded, part: str, key: str) -> float | None:
    """A test metric of the summary: ``part`` is ``final``, ``selected`` or ``before``."""
    found = ((run.summary or {}).get(part) or {}).get("test") or {}
    return found.get(key)


def asked(run: Recorded, part: str, key: str) -> float | None:
    """What a language model is asked besides its test split: ``part`` is ``choices`` or ``generate``, after the run."""
    return (((run.summary or {}).get("final") or {}).get(part) or {}).get(key)


def traffic(run: Recorded, part: str | None = None) -> float | None:
    """Bytes of all rounds: ``up``, ``down``, or both. None where nothing is sent."""
    if not run.federated or not run.rounds:
        return None
    parts = (part,) if part else ("up", "down")
    return float(sum(getattr(r, f"bytes_{name}") for r in run.rounds for name in parts))


def simulated(run: Recorded) -> float | None:
    """Simulated seconds of all rounds; None where a round has none."""
    seconds = [r.seconds for r in run.rounds]
    return float(sum(s for s in seconds if s is not None)) if seconds and None not in seconds else None


def wall(run: Recorded) -> float | None:
    """Seconds that passed in rounds."""
    return (run.summary or {}).get("wall_seconds")


def trained(run: Recorded) -> tuple[float, float] | None:
    """Trained parameters of a client in a round: of the largest, and on average.

        sum over layers r (d_in if A is trained, + d_out if B is) + dense

    None where the layers' shapes are not known.
    """
    shapes = run.facts.get("modules") or {}
    if not run.rounds or not run.modules or not all(name in shapes for name in run.modules):
        return None
    d_out, d_in = np.array([shapes[name]["shape"] for name in run.modules], float).T
    each = {"A": d_in, "B": d_out, "AB": d_in + d_out}
    counts = np.concatenate([r.ranks @ each[r.factors] for r in run.rounds])
    dense = float(run.facts.get("dense") or 0)
    return (float(counts.max()) + dense, float(counts.mean()) + dense) if len(counts) else None


def measured_everywhere(entries: Iterable[Entry]) -> bool:
    """Whether memory was measured in all finished runs with rounds: a column holds one kind of number."""
    return all(run.measured_memory is not None for entry in entries for run in entry.finished if run.rounds)


def peak_memory(entry: Entry, measured: bool) -> Value | None:
    """Largest peak of a client in bytes, as measured, or as predicted and marked so."""
    if measured:
        return over_seeds(run.measured_memory for run in entry.finished)
    predicted = (max((r.memory for r in run.rounds if r.memory), default=None) for run in entry.finished)
    return over_seeds(predicted, "predicted")


def clients(run: Recorded) -> dict[str, float]:
    """Accuracy (or nats per token) of the final model on each client's own held-out data, where it was asked for."""
    final = of_clients(((run.summary or {}).get("final") or {}).get("clients"), run.goal)
    return final or dict(next((r.clients for r in reversed(run.rounds) if r.clients), {}))


def worst(run: Recorded) -> float | None:
    """The worst client's accuracy, or nats per token."""
    return (min if run.goal.sign > 0 else max)(clients(run).values(), default=None)


def unevenness(run: Recorded) -> float | None:
    """Standard deviation over clients."""
    own = list(clients(run).values())
    return float(np.std(own)) if own else None

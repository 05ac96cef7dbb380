"""What happened over rounds, over bytes and over simulated time: curves with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from polyrank.report.charts.shapes import MOST_POINTS, Axis, Line, Lines, scaled, thinned
from polyrank.report.gather import Entry, Gathered
from polyrank.report.goal import ACCURACY, Goal
from polyrank.report.records import Recorded, Round
from polyrank.report.styles import Style, style_of

Read = Callable[[Round], float | None]
ROUND = Axis("round")
BAND = "Bands are one standard deviation over seeds."


def looks(gathered: Gathered) -> dict[str, Style]:
    """Entry label -> look: a method's settings differ by dash, in the order in which they were named."""
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for entry in gathered.entries:
        found[entry.label] = style_of(entry.method, seen.setdefault(entry.method, 0))
        seen[entry.method] += 1
    return found


def metric(key: str) -> Read:
    """Reads a metric of a round."""
    return lambda r: r.metrics.get(key)


def worst_client(goal: Goal) -> Read:
    """Reads what the worst client has on its own held-out data."""
    worst = min if goal.sign > 0 else max
    return lambda r: worst(r.clients.values(), default=None)


def client_spread(r: Round) -> float | None:
    """The standard deviation over clients."""
    return float(np.std(list(r.clients.values()))) if r.clients else None


def curve(entry: Entry, style: Style, read: Read, along: Read | None = None) -> Line | None:
    """The mean over seeds of what `read` finds, in rounds that every run of the entry has.

    Args:
        entry: whose runs.
        style: its look.
        read: the value of a round.
        along: what the horizontal axis adds up, for example bytes; its mean over seeds is drawn. None: rounds.
    """
    runs = [run for run in entry.shown if run.rounds]
    values = [_values(run, read) for run in runs]
    common = sorted(set.intersection(*map(set, values))) if values else []
    if not common:
        return None
    places = [_progress(run, along) if along else None for run in runs]
    if any(along and not place for place in places):
        return None
    common = [common[i] for i in thinned(len(common), MOST_POINTS)]
    y = np.array([[own[n] for n in common] for own in values])
    x = np.mean([[place[n] for n in common] for place in places], axis=0) if along else np.array(common)
    spread = tuple(np.std(y, axis=0, ddof=1).tolist()) if len(runs) > 1 else ()
    return Line(entry.label, style, tuple(x.tolist()), tuple(y.mean(axis=0).tolist()), spread)


def _values(run: Recorded, read: Read) -> dict[int, float]:
    found = ((r.number, read(r)) for r in run.rounds)
    return {number: value for number, value in found if value is not None and math.isfinite(value)}


def _progress(run: Recorded, along: Read) -> dict[int, float]:
    """Round -> all that has been added up by its end; empty where a round does not say."""
    steps = [along(r) for r in run.rounds]
    if None in steps:
        return {}
    return dict(zip((r.number for r in run.rounds), np.cumsum(steps).tolist(), strict=True))


def _lines(gathered: Gathered, read: Read, along: Read | None = None, *, sent: bool = False) -> tuple[Line, ...]:
    styles = looks(gathered)
    entries = [e for e in gathered.entries if e.federated or not sent]
    drawn = (curve(entry, styles[entry.label], read, along) for entry in entries)
    return tuple(line for line in drawn if line is not None)


def over_rounds(gathered: Gathered) -> Iterator[Lines]:
    """The curves whose horizontal axis is the round."""
    goal, name = gathered.goal, _named(gathered)
    reached = Axis(f"validation {goal.axis}", goal.scale)
    own = Axis(goal.own, goal.scale)
    plans: Sequence[tuple[str, str, str, Axis, Read]] = (
        ("accuracy", f"{name} over rounds", "How fast each method learns.", reached, metric(f"validation/{goal.key}")),
        ("loss", "Local loss over rounds", "Mean training loss of the clients of a round.", Axis("loss"), _loss),
        (
            *("worst_client", "The worst client over rounds"),
            f"{goal.name.capitalize()} of the client that the aggregated model serves worst.",
            *(own, worst_client(goal)),
        ),
        (
            *("client_spread", "Spread over clients, over rounds"),
            f"Standard deviation of {goal.name} over clients: 0 serves everybody alike.",
            *(Axis("standard deviation over clients", goal.scale), client_spread),
        ),
        (
            *("aggregation_error", "Aggregation error over rounds"),
            "How far the new model is from the exact mean of the clients' models, relative to the round's change: "
            "0 is exact, 1 as far as if the round had been ignored.",
            *(Axis("relative error"), lambda r: r.error),
        ),
        *(
            (
                *(f"epsilon_{whom}", f"Privacy spent over rounds ({whom})"),
                f"Epsilon of all rounds so far, of what protects {whom}.",
                *(Axis("epsilon"), metric(f"privacy/{whom}")),
            )
            for whom in ("clients", "examples")
        ),
    )
    for key, title, says, y, read in plans:
        sent = key in ("aggregation_error",)
        if lines := _lines(gathered, read, sent=sent):
            yield Lines(key, title, _said(says, lines), ROUND, y, lines)


def _named(gathered: Gathered) -> str:
    """What is validated, told from the loss of training."""
    return "Accuracy" if gathered.goal is ACCURACY else "Held-out loss"


def _loss(r: Round) -> float | None:
    return r.loss


def _sent(r: Round) -> float:
    return float(r.bytes_up + r.bytes_down)


def _seconds(r: Round) -> float | None:
    return r.seconds


def over_costs(gathered: Gathered) -> Iterator[Lines]:
    """What was reached against what it cost so far: bytes of federated methods, and simulated seconds."""
    goal, name = gathered.goal, _named(gathered)
    read = metric(f"validation/{goal.key}")
    plans = (
        ("bytes", f"{name} over bytes", "What a byte buys: traffic of all clients, both ways, so far.", _sent),
        ("seconds", f"{name} over simulated time", "What waiting buys, with the fleet's own links.", _seconds),
    )
    for unit, title, says, along in plans:
        lines = _lines(gathered, read, along, sent=True)
        if not lines:
            continue
        x, factor = scaled(
            "sent and received" if unit == "bytes" else "simulated time", (line.x[-1] for line in lines), unit
        )
        moved = tuple(replace(line, x=tuple(value / factor for value in line.x)) for line in lines)
        y = Axis(f"validation {goal.axis}", goal.scale)
        yield Lines(f"accuracy_over_{unit}", title, _said(says, lines), x, y, moved)


def _said(says: str, lines: Sequence[Line]) -> str:
    return f"{says} {BAND}" if any(line.spread for line in lines) else says

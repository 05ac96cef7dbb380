"""What came out of it: the ranking, the accuracy-communication front, clients from worst to best, confusions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from polyrank.report import measures
from polyrank.report.charts.curves import looks
from polyrank.report.charts.shapes import (
    MOST_POINTS,
    MOST_ROWS,
    Axis,
    Dot,
    Dots,
    Frame,
    Heat,
    Line,
    Lines,
    Panel,
    Point,
    Points,
    scaled,
    thinned,
)
from polyrank.report.gather import Gathered
from polyrank.report.goal import Goal
from polyrank.report.styles import style_of
from polyrank.report.tables import Row, Table

_MOST_CLASSES = 200


def ranking(gathered: Gathered, table: Table) -> Iterator[Dots]:
    """The final test figure, best on top."""
    goal, styles = gathered.goal, looks(gathered)
    known = [row for row in table.rows if row.values["final"]]
    trained = [row for row in known if row.method != "zero_shot"]
    rows = trained if len(trained) > 1 else known
    dots = [
        Dot(row.label, styles.get(row.label, style_of(row.method)), value.mean, value.spread or 0.0, value.single)
        for row in rows
        if (value := row.values["final"]) is not None
    ]
    if len(dots) > 1:
        says = f"Test {goal.name} after the last round"
        if any(len(dot.single) > 1 for dot in dots):
            says += ": the mean over seeds, one standard deviation either way, and the single seeds as small dots"
        says += "." if rows == known else "; the untrained model is in the table only."
        yield Dots("ranking", f"Final {goal.name}", says, _final(goal), Axis(""), tuple(dots))


def _final(goal: Goal) -> Axis:
    return Axis(f"test {goal.axis}, final round", goal.scale)


def front(gathered: Gathered, table: Table) -> Iterator[Points]:
    """Final accuracy against all bytes."""
    rows = [row for row in table.rows if row.values["final"] and row.values.get("up") and row.values.get("down")]
    if not rows:
        return
    goal, styles = gathered.goal, looks(gathered)
    x, factor = scaled("sent and received in all", (_bytes(row) for row in rows), "bytes")
    points = []
    for row in rows:
        value, totals = row.values["final"], measures.over_seeds(measures.traffic(run) for run in row.entry.finished)
        spreads = (totals.spread or 0.0) / factor, value.spread or 0.0
        points.append(Point(row.label, styles[row.label], totals.mean / factor, value.mean, *spreads))
    levels = tuple(
        Point(row.label, style_of(row.method), 0.0, row.values["final"].mean)
        for row in table.rows
        if row.method in ("single", "local") and row.values["final"]
    )
    says = (
        f"{'Up' if goal.sign > 0 else 'Down'} and to the left is better. "
        "Rings and the grey line mark the methods that no other beats in both; "
        "horizontal lines are baselines that send nothing."
    )
    title = f"{goal.name.capitalize()} against communication"
    unbeaten = tuple((a, goal.sign * b) for a, b in pareto([(p.x, goal.sign * p.y) for p in points]))
    yield Points("front", title, says, x, _final(goal), tuple(points), unbeaten, levels)


def _bytes(row: Row) -> float:
    return row.values["up"].mean + row.values["down"].mean


def pareto(places: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The places that none beats: nowhere is there as much or more for as little or less."""
    best, kept = -np.inf, []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if y > best:
            kept.append((x, y))
            best = y
    return tuple(kept)


def fairness(gathered: Gathered) -> Iterator[Lines | Heat]:
    """What the final model reaches on each client's own data: sorted, and client by client where they are few."""
    goal, styles = gathered.goal, looks(gathered)
    name = goal.name.capitalize()
    lines, known = [], {}
    for entry in gathered.entries:
        runs = [own for run in entry.shown if (own := measures.clients(run))]
        if not runs:
            continue
        names = sorted(set.intersection(*map(set, runs)))
        known[entry.label] = {name: float(np.mean([own[name] for own in runs])) for name in names}
        sizes = {len(own) for own in runs}
        ordered = (
            np.mean([sorted(own.values(), reverse=goal.sign < 0) for own in runs], axis=0)
            if len(sizes) == 1
            else np.array([])
        )
        if len(ordered):
            kept = thinned(len(ordered), MOST_POINTS)
            x = tuple((place + 0.5) / len(ordered) for place in kept)
            lines.append(Line(entry.label, styles[entry.label], x, tuple(float(ordered[i]) for i in kept)))
    y = Axis(goal.own, goal.scale)
    if lines:
        fair = "higher" if goal.sign > 0 else "lower"
        says = f"Each client's {goal.name}, from the worst to the best: {fair} on the left and flatter is fairer."
        x = Axis("clients, worst to best", "percent")
        yield Lines("client_accuracy", f"{name} of clients, worst to best", says, x, y, tuple(lines))
    clients = sorted(set().union(*known.values())) if known else []
    if known and len(clients) <= MOST_ROWS:
        members = gathered.runs[0].facts.get("members") or {}
        clients.sort(key=lambda c: (list(_groups(gathered)).index(g) if (g := _group(members, c)) else -1, c))
        values = np.array([[own.get(c, np.nan) for c in clients] for own in known.values()])
        starts = _starts([_group(members, c) for c in clients])
        panel = Panel("all methods", tuple(known), tuple(clients), (Frame("final", values),), starts)
        says = f"Who gains from which method: {goal.name} of the final model on each client's own held-out data."
        title = f"{name} client by client"
        yield Heat("clients", title, says, Axis("client"), Axis(""), (panel,), y)


def _groups(gathered: Gathered) -> dict[str, None]:
    return dict.fromkeys([*(g["name"] for g in gathered.runs[0].facts.get("groups") or []), ""])


def _group(members, client: str) -> str:
    return (members.get(client) or {}).get("group") or ""


def _starts(names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    return tuple((i, name) for i, name in enumerate(names) if name and (i == 0 or names[i - 1] != name))


def confusion(gathered: Gathered) -> Iterator[Heat]:
    """Confusion matrices of the final models, all seeds together."""
    panels = []
    for entry in gathered.entries:
        found = [run.confusion for run in entry.finished if run.confusion]
        classes = found[0]["classes"] if found else []
        counts = [np.array(own["counts"], float) for own in found if own["classes"] == classes]
        if counts and len(classes) <= _MOST_CLASSES:
            total = np.sum(counts, axis=0)
            shares = total / np.maximum(total.sum(axis=1, keepdims=True), 1)
            names = tuple(map(str, classes))
            panels.append(Panel(entry.label, names, names, (Frame("final", shares),)))
    if panels:
        says = "Of the examples of each true class (rows), the share given each class (columns); all seeds together."
        value = Axis("share of the true class", "percent")
        yield Heat("confusion", "Confusion", says, Axis("predicted"), Axis("true"), tuple(panels), value, top=1.0)

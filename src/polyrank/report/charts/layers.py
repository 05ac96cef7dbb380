"""Who trains which layer at which rank, which layers matter, and who was missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from polyrank.report.charts.curves import looks
from polyrank.report.charts.shapes import MOST_ROWS, Axis, Frame, Heat, Panel, Point, Points, scaled, thinned
from polyrank.report.gather import Entry, Gathered
from polyrank.report.records import Recorded, Round
from polyrank.report.styles import NEUTRAL, Style

MOST_FRAMES = 40
MOST_CELLS = 2_000_000
_MOST_COLUMNS = 200
_ALIKE = Style(NEUTRAL, "circle", "solid")
_STATES = ("not asked", "took part", "did not answer", "refused")


def rank_maps(gathered: Gathered) -> Iterator[Heat]:
    """Layer x client ranks over rounds, of one run an entry."""
    runs = [(e, e.example) for e in gathered.entries if e.federated and any(r.ranks.any() for r in e.example.rounds)]
    if not runs:
        return
    cells = max(min(_clients(run), MOST_ROWS) * len(run.modules) for _, run in runs)
    frames = max(3, min(MOST_FRAMES, MOST_CELLS // (cells * len(runs))))
    panels = tuple(_ranks(entry, run, frames) for entry, run in runs)
    says = (
        "The rank at which each client (row) trains each module (column, in the order of blocks); blank: it does not "
        f"train it{_of_many(runs, panels)}. Rounds that change nothing share a picture"
        + (f"; of more than {frames}, {frames} are kept." if any(len(p.frames) == frames for p in panels) else ".")
    )
    title = "Ranks by layer and client"
    yield Heat("ranks", title, says, Axis("module"), Axis("client"), panels, Axis("rank"))


def _clients(run: Recorded) -> int:
    return len({name for r in run.rounds for name in r.asked})


def _of_many(runs, panels) -> str:
    most = max(_clients(run) for _, run in runs)
    shown = f"; at most {MOST_ROWS} of {most:,} clients, those that took part most often, or else evenly spread"
    return shown if most > max(len(panel.rows) for panel in panels) else ""


def _ranks(entry: Entry, run: Recorded, most: int) -> Panel:
    asked = Counter(name for r in run.rounds for name in r.asked)
    if len(asked) > MOST_ROWS and len(set(asked.values())) > 1:
        asked = Counter(dict(sorted(asked.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_ROWS]))
    rows, names = rows_of(run, sorted(asked))
    order, columns, starts = _modules(run)
    frames: list[tuple[int, int, np.ndarray]] = []
    for r in run.rounds:
        values = _picture(r, rows)[:, order]
        if frames and np.array_equal(frames[-1][2], values):
            frames[-1] = (frames[-1][0], r.number, values)
        else:
            frames.append((r.number, r.number, values))
    kept = [frames[i] for i in thinned(len(frames), most)]
    made = tuple(Frame(f"round {a}" if a == b else f"rounds {a}-{b}", np.where(v > 0, v, np.nan)) for a, b, v in kept)
    return Panel(f"{entry.label}, seed {run.seed}", tuple(names), columns, made, starts)


def _picture(r: Round, rows: Sequence[str]) -> np.ndarray:
    place = {name: i for i, name in enumerate(r.asked)}
    blank = np.zeros(r.ranks.shape[1], r.ranks.dtype)
    return np.array([r.ranks[place[name]] if name in place else blank for name in rows], float)


def rows_of(run: Recorded, clients: Sequence[str]) -> tuple[list[str], list[str]]:
    """At most 60 of the clients, by group and evenly spread, and their names for an axis."""
    members = run.facts.get("members") or {}
    groups = {group["name"]: i for i, group in enumerate(run.facts.get("groups") or [])}

    def group(name: str) -> str:
        return (members.get(name) or {}).get("group") or ""

    ordered = sorted(clients, key=lambda name: (groups.get(group(name), len(groups)), name))
    shown = [ordered[i] for i in thinned(len(ordered), MOST_ROWS)]
    return shown, [f"{name} ({group(name)})" if group(name) else name for name in shown]


def _modules(run: Recorded) -> tuple[list[int], tuple[str, ...], tuple[tuple[int, str], ...]]:
    """The order of modules by block, their names, and where blocks begin."""
    facts = run.facts.get("modules") or {}
    blocks = [(facts.get(name) or {}).get("block") for name in run.modules]
    order = sorted(range(len(blocks)), key=lambda i: (blocks[i] is None, blocks[i] or 0, i))
    starts = [
        (place, f"block {blocks[i]}" if blocks[i] is not None else "elsewhere")
        for place, i in enumerate(order)
        if facts and (place == 0 or blocks[i] != blocks[order[place - 1]])
    ]
    return order, tuple(run.modules[i] for i in order), tuple(starts)


def importance(gathered: Gathered) -> Iterator[Heat]:
    """Layer x round importance, as shares of a round's sum."""
    panels = []
    for entry in gathered.entries:
        run = entry.example
        scored = [r for r in run.rounds if r.scores and any(r.scores.values())]
        if not scored or not run.modules:
            continue
        scored = [scored[i] for i in thinned(len(scored), _MOST_COLUMNS)]
        order, names, starts = _modules(run)
        values = np.array([[r.scores.get(run.modules[i], 0.0) for r in scored] for i in order], float)
        shares = values / np.maximum(values.sum(axis=0), 1e-300)
        columns = tuple(str(r.number) for r in scored)
        frames = (Frame("importance", shares),)
        panels.append(Panel(f"{entry.label}, seed {run.seed}", names, columns, frames, row_starts=starts))
    if panels:
        says = "Which modules mattered in the rounds that measured it, as shares of each round's sum."
        value = Axis("share of importance", "percent")
        title = "Importance by layer"
        yield Heat("importance", title, says, Axis("round"), Axis("module"), tuple(panels), value)


def attendance(gathered: Gathered) -> Iterator[Heat]:
    """Who did not answer and whose update was refused, where that happened at all."""
    panels = []
    for entry in (entry for entry in gathered.entries if entry.federated):
        run = entry.example
        trouble: dict[str, int] = {}
        for r in run.rounds:
            for name in [*r.dropped, *r.refused]:
                trouble[name] = trouble.get(name, 0) + 1
        if not trouble:
            continue
        clients = sorted({name for r in run.rounds for name in r.asked} | trouble.keys())
        if len(clients) > MOST_ROWS:
            clients = sorted(sorted(clients, key=lambda name: -trouble.get(name, 0))[:MOST_ROWS])
        rows, names = rows_of(run, clients)
        states = np.array([[_state(r, name) for r in run.rounds] for name in rows], float)
        bins = np.array_split(np.arange(len(run.rounds)), min(len(run.rounds), _MOST_COLUMNS))
        values = np.array([states[:, own].max(axis=1) for own in bins]).T
        columns = tuple(str(run.rounds[own[0]].number) for own in bins)
        panels.append(Panel(f"{entry.label}, seed {run.seed}", tuple(names), columns, (Frame("all", values),)))
    if panels:
        says = (
            "Who did not answer, and whose update was refused, round by round; of more than "
            f"{MOST_ROWS} clients those with most trouble, of more than {_MOST_COLUMNS} rounds the worst of each few."
        )
        x, y = Axis("round"), Axis("client")
        yield Heat("attendance", "Who dropped out", says, x, y, tuple(panels), Axis(""), categories=_STATES, top=3.0)


def _state(r: Round, name: str) -> int:
    return 3 if name in r.refused else 2 if name in r.dropped else 1 if name in r.asked else 0


def budgets(gathered: Gathered) -> Iterator[Points]:
    """Each group's rank budget against its memory and against its uplink."""
    plans = (
        ("memory", "memory", "memory", "Budget against memory"),
        ("uplink", "link", "uplink", "Budget against uplink"),
    )
    styles, federated = looks(gathered), [entry for entry in gathered.entries if entry.federated]
    for field, unit, words, title in plans:
        found: dict[tuple[str, float, float, str], list[Entry]] = {}
        for entry in federated:
            for group in entry.example.facts.get("groups") or []:
                if group.get(field) is not None and group.get("budget") is not None:
                    text = f"{group['name']}: {group['clients']} clients, limited by {group.get('limit') or 'nothing'}"
                    found.setdefault((group["name"], group[field], group["budget"], text), []).append(entry)
        if not found:
            continue
        x, factor = scaled(words, (amount for _, amount, _, _ in found), unit)
        points = []
        for (_, amount, budget, text), entries in found.items():
            label = entries[0].label if len(entries) == 1 else f"{len(entries)} methods"
            style = styles[entries[0].label] if len(entries) == 1 else _ALIKE
            points.append(Point(label, style, amount / factor, budget, text=text))
        says = "What each device group may spend, in ranks summed over modules; grey: several methods budget alike."
        yield Points(f"budget_{field}", title, says, x, Axis("rank budget"), tuple(points))

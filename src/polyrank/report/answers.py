"""What a reader asks first, answered from the table: which method won, by how much, at what cost, can I trust it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polyrank.report.gather import Gathered
from polyrank.report.goal import Goal
from polyrank.report.measures import Value, over_seeds
from polyrank.report.tables import Row, Table, beats, federated, said
from polyrank.report.terminal import size, span


@dataclass(frozen=True)
class Fact:
    """One answer: what it is about, the answer itself, what to know about it, and whether to be careful."""

    title: str
    value: str
    says: str
    careful: bool = False


@dataclass(frozen=True)
class Answers:
    """The title and first sentence of a page, and its facts."""

    title: str
    lead: str
    facts: tuple[Fact, ...]


def answers(gathered: Gathered, table: Table) -> Answers:
    """The first screen of a report."""
    rows = federated(table) or [row for row in table.rows if row.entry and row.values["final"]]
    if not rows:
        return _unfinished(gathered)
    best, others, goal = rows[0], rows[1:], table.goal
    facts = (
        *_margin(goal, best, others),
        *_between(table, best),
        *_cost(goal, best, others),
        _trust(gathered, goal, rows),
    )
    if not others:
        return Answers(f"{best.label} reached {said(goal, best.values['final'])}", _single(gathered, best), facts)
    how = {"more": f"with {said(goal, best.values['final'])}", "alike": "within the spread", "unknown": "on one seed"}
    title = f"{best.label} leads {how[_word(goal, best, others[0])]}"
    return Answers(title, _compared(gathered, goal, best, others[0]), facts)


def _word(goal: Goal, best: Row, other: Row) -> str:
    """`beats`, which single seeds cannot answer."""
    if len(best.values["final"].single) < 2 or len(other.values["final"].single) < 2:
        return "unknown"
    return beats(best.values["final"], other.values["final"], goal)


def _margin(goal: Goal, best: Row, others: Sequence[Row]) -> Iterator[Fact]:
    if not others:
        return
    gap = goal.gap(best.values["final"].mean - others[0].values["final"].mean)
    word = _word(goal, best, others[0])
    says = {
        "more": "More than the spread over seeds.",
        "alike": "Within the spread over seeds: this order may be chance.",
        "unknown": "One seed: how much of it is chance is not known.",
    }[word]
    alike = [row.label for row in others if _word(goal, best, row) == "alike"]
    if len(alike) > 1:
        says = f"Within the spread over seeds, like {len(alike) - 1} more: this order may be chance."
    yield Fact("Margin", gap, f"Over {others[0].label}, the next. {says}", word != "more")


def _between(table: Table, best: Row) -> Iterator[Fact]:
    """How far from the floor to the ceiling."""
    goal = table.goal
    found = {name: _same_setting(table, name, best) for name in ("local", "single", "zero_shot")}
    here, floor, ceiling, start = (best.values["final"], *(found[n] for n in ("local", "single", "zero_shot")))
    if floor and ceiling and goal.sign * (ceiling.mean - floor.mean) > 0:
        way = (here.mean - floor.mean) / (ceiling.mean - floor.mean)
        ends = f"every client alone ({said(goal, floor)}) to training on pooled data ({said(goal, ceiling)})"
        says = f"Of the way from {ends}."
        yield Fact("Against the baselines", f"{100 * way:.0f} %", says, not 0 <= way <= 1)
    elif floor or ceiling or start:
        name, base = next((n, v) for n, v in (("local", floor), ("single", ceiling), ("zero_shot", start)) if v)
        names = {"local": "every client alone", "single": "training on pooled data", "zero_shot": "the model untrained"}
        gap = goal.gap(here.mean - base.mean)
        yield Fact("Against a baseline", gap, f"Against {names[name]} ({said(goal, base)}).")


def _same_setting(table: Table, name: str, best: Row) -> Value | None:
    rows = [row for row in table.rows if row.method == name and row.values["final"]]
    alike = [row for row in rows if row.setting == best.setting] or rows
    return alike[0].values["final"] if alike else None


def _cost(goal: Goal, best: Row, others: Sequence[Row]) -> Iterator[Fact]:
    cost = _bytes(best)
    if cost is None:
        return
    each = [
        text
        for key, name in (("simulated", "simulated"), ("wall", "on the machine that ran it"))
        if (value := best.values.get(key)) and (text := f"{span(value.mean)} {name}")
    ]
    says = f"Sent and received by all clients, a run; {', '.join(each)}." if each else "Sent and received, a run."
    cheaper = [
        (b, row) for row in others if (b := _bytes(row)) is not None and b < cost and _word(goal, best, row) == "alike"
    ]
    if cheaper:
        least, row = min(cheaper, key=lambda pair: pair[0])
        says += f" {row.label}, alike within the spread, takes {size(least)}."
    yield Fact("Cost", size(cost), says)


def _bytes(row: Row) -> float | None:
    up, down = row.values.get("up"), row.values.get("down")
    return up.mean + down.mean if up and down else None


def _trust(gathered: Gathered, goal: Goal, rows: Sequence[Row]) -> Fact:
    seeds = min(len(row.values["final"].single) for row in rows)
    unfinished = sum(run.summary is None for run in gathered.runs)
    value = f"{seeds} seed{'s' if seeds > 1 else ''}" + (" each" if len(rows) > 1 else "")
    says = f"Test {goal.name} after the last round; nothing is selected on test data."
    if seeds < 2:
        says += " One seed has no spread: repeat it before you believe a difference."
    if unfinished:
        says += f" {unfinished} of {len(gathered.runs)} runs are unfinished."
    if gathered.notes:
        says += " Read the notes below."
    elif len(rows) > 1:
        says += " The runs share data and clients, and differ in method and setting alone."
    return Fact("Trust", value, says, bool(seeds < 2 or gathered.notes))


def _single(gathered: Gathered, best: Row) -> str:
    run = best.entry.example if best.entry else gathered.runs[0]
    return _where(gathered, f"{len(run.rounds)} rounds" if run.rounds else "No rounds")


def _compared(gathered: Gathered, goal: Goal, best: Row, second: Row) -> str:
    gap = goal.sign * (best.values["final"].mean - second.values["final"].mean)
    by = f"{goal.gap(gap).lstrip('+')} {goal.than[0]}"
    words = {
        "more": f"{by} {second.label}, more than the spread over seeds.",
        "alike": f"{said(goal, best.values['final'])} against {said(goal, second.values['final'])} of {second.label}: "
        "the difference is within the spread over seeds.",
        "unknown": f"{by} {second.label}, on one seed, so its spread is not known.",
    }[_word(goal, best, second)]
    return f"{words[0].upper()}{words[1:]} {_where(gathered)}"


def _where(gathered: Gathered, what: str | None = None) -> str:
    """Runs, data and clients in one sentence."""
    run = gathered.runs[0]
    data = run.facts.get("data") or (run.experiment.get("data") or {}).get("name")
    clients = run.facts.get("clients") or (run.experiment.get("data") or {}).get("clients")
    text = what or f"{len(gathered.runs)} run{'s' if len(gathered.runs) > 1 else ''}"
    return text + (f" on {data}" if data else "") + (f", shared by {clients:,} clients." if clients else ".")


def _unfinished(gathered: Gathered) -> Answers:
    """What there is to say before any run has ended."""
    reached, goal = [], gathered.goal
    key = f"validation/{goal.key}"
    for entry in gathered.entries:
        for run in entry.runs:
            known = [r for r in run.rounds if key in r.metrics]
            if known:
                reached.append((known[-1].metrics[key], entry.label, known[-1].number))
    facts = [
        Fact("Runs", f"0 of {len(gathered.runs)}", f"Finished. Test {goal.name} is measured once, at the end.", True)
    ]
    if reached:
        value, label, number = max(reached, key=lambda one: goal.sign * one[0])
        says = f"Validation {goal.name} of {label} after round {number}, the best so far."
        facts.append(Fact("So far", said(goal, over_seeds([value])), says))
    return Answers("No run has finished yet", _where(gathered), tuple(facts))

"""The summary table, method x setting, and what it says in words; as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyrank.report import measures, text
from polyrank.report.gather import Entry, Gathered
from polyrank.report.goal import ACCURACY, Goal
from polyrank.report.measures import Value, over_seeds
from polyrank.report.terminal import size, span


@dataclass(frozen=True)
class Column:
    """A column: its key, its title, what it means, how its numbers are written, and whether more is better."""

    key: str
    title: str
    says: str
    kind: str
    better: str = ""


@dataclass(frozen=True)
class Row:
    """A method in a setting. ``entry`` is None for what other runs' summaries say of a baseline."""

    method: str
    setting: str
    seeds: str
    values: Mapping[str, Value | None]
    entry: Entry | None

    @property
    def label(self) -> str:
        return f"{self.method} · {self.setting}" if self.setting else self.method


@dataclass(frozen=True)
class Table:
    """Rows, best final figure first, of those columns that any row has a value in."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    goal: Goal = ACCURACY


_COLUMNS = (
    Column("perplexity", "perplexity", "Of the test split, final round: exp of nats per token.", "score", "low"),
    Column("choices", "multiple choice", "Questions whose most likely choice is right, final.", "percent", "high"),
    Column("choices_norm", "by character", "The same by likelihood per character.", "percent", "high"),
    Column("exact", "exact match", "Generated answers that are the reference, final.", "percent", "high"),
    Column("rouge", "ROUGE-L", "F measure of generated answers against references, final.", "percent", "high"),
    Column("f1", "macro F1", "Mean F1 score over classes on the test split, final round.", "percent", "high"),
    Column("mcc", "MCC", "Matthews correlation on the test split, final round.", "score", "high"),
    Column("up", "sent up", "Bytes from clients to the server over all rounds.", "bytes", "low"),
    Column("down", "sent down", "Bytes from the server to clients over all rounds.", "bytes", "low"),
    Column(
        "simulated", "simulated time", "Transfer and compute as the fleet's links and speeds have it.", "seconds", "low"
    ),
    Column("wall", "wall time", "Time spent in rounds on the machine that ran them.", "seconds", "low"),
    Column("largest", "trained, largest", "Trained parameters of the largest client in a round.", "count", "low"),
    Column("average", "trained, mean", "Trained parameters of a client in a round, on average.", "count", "low"),
    Column(
        "memory",
        "peak memory",
        "Largest peak of a client: measured if it was for every client of every run, else predicted (p).",
        "memory",
        "low",
    ),
)


def columns_for(goal: Goal) -> tuple[Column, ...]:
    """All columns of runs that are compared by `goal`."""
    final, best = (
        f"Test {goal.name} after the last round.",
        f"Test {goal.name} of the round that was best on validation.",
    )
    worst, uneven = f"{goal.name.capitalize()} of the worst client", f"Standard deviation of {goal.name} over clients."
    return (
        Column("final", f"{goal.title}, final", final, goal.kind, goal.better),
        Column("selected", f"{goal.title}, selected", best, goal.kind, goal.better),
        *_COLUMNS,
        Column("worst", "worst client", f"{worst} on its own held-out data.", goal.kind, goal.better),
        Column("uneven", "client spread", uneven, goal.kind, "low"),
    )


def summarise(gathered: Gathered) -> Table:
    """The table of all entries, and of baselines that only the summaries of other runs know."""
    measured = measures.measured_everywhere(gathered.entries)
    goal = gathered.goal
    rows = [_row(entry, measured, goal) for entry in gathered.entries]
    rows += _references(gathered, {row.method for row in rows}, goal)
    rows.sort(key=lambda row: -goal.sign * row.values["final"].mean if row.values["final"] else float("inf"))
    columns = tuple(c for c in columns_for(goal) if any(row.values.get(c.key) for row in rows))
    return Table(columns, tuple(rows), goal)


def _row(entry: Entry, measured: bool, goal: Goal) -> Row:
    runs = entry.finished
    trained = [measures.trained(run) for run in runs]

    def test(part: str, key: str) -> Value | None:
        return over_seeds(measures.of_summary(run, part, key) for run in runs)

    def each(measure: Callable) -> Value | None:
        return over_seeds(measure(run) for run in runs)

    values = {
        "final": test("final", goal.key),
        "selected": test("selected", goal.key),
        "perplexity": test("final", "perplexity"),
        "choices": each(lambda run: measures.asked(run, "choices", "accuracy")),
        "choices_norm": each(lambda run: measures.asked(run, "choices", "accuracy_norm")),
        "exact": each(lambda run: measures.asked(run, "generate", "exact_match")),
        "rouge": each(lambda run: measures.asked(run, "generate", "rougeL")),
        "f1": test("final", "macro_f1"),
        "mcc": test("final", "mcc"),
        "up": each(lambda run: measures.traffic(run, "up")),
        "down": each(lambda run: measures.traffic(run, "down")),
        "simulated": each(measures.simulated),
        "wall": each(measures.wall),
        "largest": over_seeds(t and t[0] for t in trained),
        "average": over_seeds(t and t[1] for t in trained),
        "memory": measures.peak_memory(entry, measured),
        "worst": each(measures.worst),
        "uneven": each(measures.unevenness),
    }
    done, all_ = len(runs), len(entry.runs)
    return Row(entry.method, entry.setting, str(done) if done == all_ else f"{done} of {all_}", values, entry)


def _references(gathered: Gathered, known: set[str], goal: Goal) -> Iterator[Row]:
    """Baselines that runs trained beside their method, where no run of their own is there: one value a seed."""
    parts = {
        "zero_shot": lambda s: (s.get("before") or {}).get("test", {}).get(goal.key),
        "single": lambda s: s.get("baselines", {}).get("single", {}).get("test", {}).get(goal.key),
        "local": lambda s: _mean_alone(s.get("baselines", {}).get("local", {}), goal),
    }
    for name, find in parts.items():
        seeds: dict[int, float] = {}
        for run in gathered.runs:
            value = find(run.summary or {})
            if value is not None:
                seeds.setdefault(run.seed, value)
        if name not in known and seeds:
            yield Row(name, "", str(len(seeds)), {"final": over_seeds(seeds.values())}, None)


def _mean_alone(local: Mapping[str, Any], goal: Goal) -> float | None:
    """The mean of clients that train alone; earlier versions told their accuracy only."""
    return local.get("mean", {"accuracy": local.get("mean_accuracy")}).get(goal.key)


# What the table says in words


def beats(a: Value, b: Value, goal: Goal = ACCURACY) -> str:
    """``more`` (better), ``less``, or ``alike`` where the means differ by no more than the larger spread over seeds."""
    difference = goal.sign * (a.mean - b.mean)
    if abs(difference) <= max(a.spread or 0.0, b.spread or 0.0):
        return "alike"
    return "more" if difference > 0 else "less"


def federated(table: Table) -> list[Row]:
    """Rows of federated methods that have a final figure, best first."""
    return [row for row in table.rows if row.entry is not None and row.entry.federated and row.values["final"]]


def leaders(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, set[str]]:
    """The labels of the rows that are best, by column; of none where all are alike."""
    found: dict[str, set[str]] = {}
    for column in columns:
        known = {row.label: value.mean for row in rows if (value := row.values.get(column.key))}
        first = (max if column.better == "high" else min)(known.values(), default=None)
        best = {label for label, mean in known.items() if mean == first}
        found[column.key] = best if len(best) < len(rows) else set()
    return found


def ordering(table: Table) -> tuple[str, ...]:
    """Whether single >= every federated method >= local holds, as sentences; empty without baselines."""
    return tuple(sentence for name in ("single", "local") for sentence in _held_against(table, name))


def _held_against(table: Table, name: str) -> Iterator[str]:
    """What is said of one baseline, in each of its settings."""
    goal, above = table.goal, name == "single"
    who, word = "pooled training" if above else "training alone", goal.than[0 if above else 1]
    bases = [row for row in table.rows if row.method == name and row.values["final"]]
    compared, broken = 0, 0
    alike: list[str] = []
    for base in bases:
        rows = [row for row in federated(table) if row.setting == base.setting or not base.setting]
        compared += len(rows)
        found = [row for row in rows if _beyond(row, base, name, goal)]
        broken += len(found)
        alike += [row.label for row in rows if beats(row.values["final"], base.values["final"], goal) == "alike"]
        if found:
            names = ", ".join(f"{row.label} ({said(goal, row.values['final'])})" for row in found)
            at = f"{base.label}, {said(goal, base.values['final'])}"
            yield f"The expected order does not hold: {word} {who} ({at}) is {names}."
    if compared and not broken:
        at = said(goal, bases[0].values["final"]) if len(bases) == 1 else "in the same setting"
        yield f"No federated method is {word} {who} ({name}, {at}), as expected."
    if alike:
        yield f"Within the spread over seeds of {who}: {', '.join(alike)}."


def _beyond(row: Row, base: Row, name: str, goal: Goal) -> bool:
    """Whether a federated method is where none should be: above pooled training, or below training alone."""
    return beats(row.values["final"], base.values["final"], goal) == ("more" if name == "single" else "less")


# Numbers for people


def said(goal: Goal, value: Value | None) -> str:
    """``85.2 ± 0.6 %`` or ``3.012 ± 0.010 nats``, or without a spread where there is one seed."""
    return f"{written(goal.kind, value)} {'%' if goal.kind == 'percent' else 'nats'}" if value else "-"


def number(kind: str, value: float) -> str:
    """One number of a column, in its unit."""
    if kind == "percent":
        return f"{100 * value:.2f}"
    if kind in ("score", "nats"):
        return f"{value:.3f}"
    if kind == "bytes":
        return size(value)
    if kind == "seconds":
        return span(value)
    if kind == "memory":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{round(value):,}"


def written(kind: str, value: Value | None, sign: str = "±") -> str:
    """Mean and spread; a spread is left out where it is unknown, or nothing beside the mean."""
    if value is None:
        return "-"
    text = number(kind, value.mean) + (" (p)" if value.note == "predicted" else "")
    if value.spread is None or (kind not in ("percent", "score", "nats") and value.spread <= 5e-4 * abs(value.mean)):
        return text
    return f"{text} {sign} {number(kind, value.spread)}"


def title(column: Column) -> str:
    """A column's title, with its unit where the numbers have none."""
    return f"{column.title} (%)" if column.kind == "percent" else column.title


def markdown(table: Table) -> str:
    """The table for a README."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.markdown(cell) for cell in cells) + " |"

    heads = ["method", "setting", "seeds", *(title(c) for c in table.columns)]
    lines = [line(heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    lines += [line(_cells(table, row)) for row in table.rows]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """The table for a paper: needs ``\\usepackage{booktabs}``."""
    heads = ["method", "setting", "seeds", *(title(c) for c in table.columns)]
    lines = ["\\begin{tabular}{ll" + "r" * (len(heads) - 2) + "}", "\\toprule"]
    lines += [" & ".join(map(text.latex, heads)) + r" \\", "\\midrule"]
    lines += [" & ".join(map(text.latex, _cells(table, row))) + r" \\" for row in table.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(table: Table) -> str:
    """The table for programs: numbers in base units, mean and sample standard deviation in columns of their own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    units = {"percent": "share", "bytes": "bytes", "memory": "bytes", "seconds": "seconds"}
    heads = [f"{c.key} ({units[c.kind]})" if c.kind in units else c.key for c in table.columns]
    writer.writerow(["method", "setting", "seeds", *(part for h in heads for part in (h, f"{h} sd")), "memory is"])
    for row in table.rows:
        cells: list[str] = []
        for column in table.columns:
            value = row.values.get(column.key)
            cells += (
                ["", ""] if value is None else [repr(value.mean), "" if value.spread is None else repr(value.spread)]
            )
        memory = row.values.get("memory")
        names = (text.visible(row.method), text.visible(row.setting))
        writer.writerow([*names, row.seeds, *cells, memory and (memory.note or "measured")])
    return file.getvalue()


def _cells(table: Table, row: Row) -> list[str]:
    return [
        row.method,
        row.setting or "-",
        row.seeds,
        *(written(column.kind, row.values.get(column.key)) for column in table.columns),
    ]

"""The summary table, method x setting, and what it says in words; as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyrank.report import measures
from polyrank.report.gather import Entry, Gathered
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
    """Rows, best final accuracy first, of those columns that any row has a value in."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


COLUMNS = (
    Column("final", "accuracy, final", "Test accuracy after the last round.", "percent", "high"),
    Column(
        "selected", "accuracy, selected", "Test accuracy of the round that was best on validation.", "percent", "high"
    ),
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
    Column("worst", "worst client", "Accuracy of the worst client on its own held-out data.", "percent", "high"),
    Column("uneven", "client spread", "Standard deviation of accuracy over clients.", "percent", "low"),
)


def summarise(gathered: Gathered) -> Table:
    """The table of all entries, and of baselines that only the summaries of other runs know."""
    measured = measures.measured_everywhere(gathered.entries)
    rows = [_row(entry, measured) for entry in gathered.entries]
    rows += _references(gathered, {row.method for row in rows})
    rows.sort(key=lambda row: -row.values["final"].mean if row.values["final"] else float("inf"))
    columns = tuple(c for c in COLUMNS if any(row.values.get(c.key) for row in rows))
    return Table(columns, tuple(rows))


def _row(entry: Entry, measured: bool) -> Row:
    runs = entry.finished
    trained = [measures.trained(run) for run in runs]

    def test(part: str, key: str) -> Value | None:
        return over_seeds(measures.of_summary(run, part, key) for run in runs)

    def each(measure: Callable) -> Value | None:
        return over_seeds(measure(run) for run in runs)

    values = {
        "final": test("final", "accuracy"),
        "selected": test("selected", "accuracy"),
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


def _references(gathered: Gathered, known: set[str]) -> Iterator[Row]:
    """Baselines that runs trained beside their method, where no run of their own is there: one value a seed."""
    parts = {
        "zero_shot": lambda s: (s.get("before") or {}).get("test", {}).get("accuracy"),
        "single": lambda s: s.get("baselines", {}).get("single", {}).get("test", {}).get("accuracy"),
        "local": lambda s: s.get("baselines", {}).get("local", {}).get("mean_accuracy"),
    }
    for name, find in parts.items():
        seeds: dict[int, float] = {}
        for run in gathered.runs:
            value = find(run.summary or {})
            if value is not None:
                seeds.setdefault(run.seed, value)
        if name not in known and seeds:
            yield Row(name, "", str(len(seeds)), {"final": over_seeds(seeds.values())}, None)


# What the table says in words


def beats(a: Value, b: Value) -> str:
    """``more``, ``less``, or ``alike`` where the means differ by no more than the larger spread over seeds."""
    difference = a.mean - b.mean
    if abs(difference) <= max(a.spread or 0.0, b.spread or 0.0):
        return "alike"
    return "more" if difference > 0 else "less"


def federated(table: Table) -> list[Row]:
    """Rows of federated methods that have a final accuracy, best first."""
    return [row for row in table.rows if row.entry is not None and row.entry.federated and row.values["final"]]


def ordering(table: Table) -> tuple[str, ...]:
    """Whether single >= every federated method >= local holds, as sentences; empty without baselines."""
    return tuple(sentence for name in ("single", "local") for sentence in _held_against(table, name))


def _held_against(table: Table, name: str) -> Iterator[str]:
    """What is said of one baseline, in each of its settings."""
    who, word = ("pooled training", "above") if name == "single" else ("training alone", "below")
    bases = [row for row in table.rows if row.method == name and row.values["final"]]
    compared, broken = 0, 0
    alike: list[str] = []
    for base in bases:
        rows = [row for row in federated(table) if row.setting == base.setting or not base.setting]
        compared += len(rows)
        found = [row for row in rows if _beyond(row, base, name)]
        broken += len(found)
        alike += [row.label for row in rows if beats(row.values["final"], base.values["final"]) == "alike"]
        if found:
            names = ", ".join(f"{row.label} ({percent(row.values['final'])})" for row in found)
            at = f"{base.label}, {percent(base.values['final'])}"
            yield f"The expected order does not hold: {word} {who} ({at}) is {names}."
    if compared and not broken:
        at = percent(bases[0].values["final"]) if len(bases) == 1 else "in the same setting"
        yield f"No federated method is {word} {who} ({name}, {at}), as expected."
    if alike:
        yield f"Within the spread over seeds of {who}: {', '.join(alike)}."


def _beyond(row: Row, base: Row, name: str) -> bool:
    """Whether a federated method is where none should be: above pooled training, or below training alone."""
    return beats(row.values["final"], base.values["final"]) == ("more" if name == "single" else "less")


# Numbers for people


def percent(value: Value | None) -> str:
    """``85.2 ± 0.6 %``, or without a spread where there is one seed."""
    return f"{written('percent', value)} %" if value else "-"


def number(kind: str, value: float) -> str:
    """One number of a column, in its unit."""
    if kind == "percent":
        return f"{100 * value:.2f}"
    if kind == "score":
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
    if value.spread is None or (kind not in ("percent", "score") and value.spread <= 5e-4 * abs(value.mean)):
        return text
    return f"{text} {sign} {number(kind, value.spread)}"


def title(column: Column) -> str:
    """A column's title, with its unit where the numbers have none."""
    return f"{column.title} (%)" if column.kind == "percent" else column.title


def markdown(table: Table) -> str:
    """The table for a README."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    heads = ["method", "setting", "seeds", *(title(c) for c in table.columns)]
    lines = [line(heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    lines += [line(_cells(table, row)) for row in table.rows]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """The table for a paper: needs ``\\usepackage{booktabs}``."""
    heads = ["method", "setting", "seeds", *(title(c) for c in table.columns)]
    lines = ["\\begin{tabular}{ll" + "r" * (len(heads) - 2) + "}", "\\toprule"]
    lines += [" & ".join(map(_escaped, heads)) + r" \\", "\\midrule"]
    lines += [" & ".join(map(_escaped, _cells(table, row))) + r" \\" for row in table.rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def as_csv(table: Table) -> str:
    """The table for programs: numbers in base units, mean and sample standard deviation in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
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
        writer.writerow([row.method, row.setting, row.seeds, *cells, memory and (memory.note or "measured")])
    return text.getvalue()


def _cells(table: Table, row: Row) -> list[str]:
    return [
        row.method,
        row.setting or "-",
        row.seeds,
        *(written(column.kind, row.values.get(column.key)) for column in table.columns),
    ]


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)

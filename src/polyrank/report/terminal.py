"""What the terminal shows of results: tables, a heat map, figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from polyrank.report.goal import goal_of
from polyrank.report.screen import Rows

if TYPE_CHECKING:
    from polyrank.experiment.session import Session

_SHADES = " ░▒▓█"


def size(count: float) -> str:
    """Bytes for people: ``1.5 MB`` is 1.5 million."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def span(seconds: float) -> str:
    """Seconds for people: ``1 min 05 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def reached(metrics: Mapping[str, float | None], prefix: str = "") -> str | None:
    """What a model is worth, for people: ``81.11%``, or of a language model ``2.871 nats``; None if it is not known."""
    loss = metrics.get(f"{prefix}loss")
    if f"{prefix}perplexity" in metrics and loss is not None:
        return f"{loss:.3f} nats"
    accuracy = metrics.get(f"{prefix}accuracy")
    return None if accuracy is None else f"{accuracy:.2%}"


def epsilons(spent: Mapping[str, float | None]) -> dict[str, str]:
    """Epsilon for people, of whom it protects: ``{"epsilon (clients)": "3.21"}``."""
    return {f"epsilon ({whom})": f"{value:.2f}" for whom, value in spent.items() if value is not None}


def headline(session: Session) -> str:
    """What is about to run, and where, and what is to be known of its model."""
    e, clients = session.experiment, session.world.clients.profiles()
    modules = len(session.world.base.spec.modules)
    opening = (
        f"{e.method.name} on {e.data.name}: {len(clients)} clients, {modules} adapted modules, "
        f"rounds {session.state.round + 1}-{e.rounds}; run in {session.run.folder}"
    )
    return "\n".join([opening, *(f"note: {note}" for note in session.world.notes)])


def outcome(summary: Mapping[str, Any], adapter: Path) -> str:
    """What it cost, and where the adapter is."""
    up, down = size(summary["bytes_up"]), size(summary["bytes_down"])
    promised = {
        f"{name} at delta {found['delta']:g}": value
        for whom, found in summary.get("privacy", {}).items()
        for name, value in epsilons({whom: found["epsilon"]}).items()
    }
    privacy = "".join(f"; {name}: {value}" for name, value in promised.items())
    cost = f"{up} up, {down} down, {span(summary['wall_seconds'])} of rounds"
    return f"{cost}{privacy}; adapter (PEFT format): {adapter}"


def results_table(summary: Mapping[str, Any]) -> Rows:
    """What the test split says before and after, and of the baselines; and what a language model is asked besides."""
    goal, final, selected = goal_of(summary["final"]["test"]), summary["final"], summary["selected"]
    rows = [("before", summary["before"]), (f"{summary['method']}, final round", final)]
    if selected and selected["round"] != final.get("round"):
        rows.append((f"{summary['method']}, round {selected['round'] + 1} (best on validation)", selected))
    baselines = summary.get("baselines", {})
    if "local" in baselines:
        local = baselines["local"]
        if "test" in local:
            rows.append((f"best single client ({local.get('best', '-')})", local))
        rows.append(("mean of single clients", {"test": local.get("mean", {"accuracy": local.get("mean_accuracy")})}))
    if "single" in baselines:
        rows.append(("centralised (pooled data)", baselines["single"]))
    asked = [column for column in _ASKED if any(_found(own, column[1:]) is not None for _, own in rows)]
    table = Rows()
    table.add_column(f"test {goal.axis}")
    table.add_column("", justify="right")
    for title, *_ in asked:
        table.add_column(title, justify="right")
    for name, own in rows:
        cells = [(column[0], _found(own, column[1:])) for column in asked]
        written = ["" if v is None else f"{v:.2f}" if t == "perplexity" else f"{v:.2%}" for t, v in cells]
        value = reached(own["test"])
        table.add_row(name, Text(value or "-", "bold" if own is final else ""), *written)
    return table


_ASKED = (
    ("perplexity", "test", "perplexity"),
    ("multiple choice", "choices", "accuracy"),
    ("by character", "choices", "accuracy_norm"),
    ("exact match", "generate", "exact_match"),
    ("ROUGE-L", "generate", "rougeL"),
)
"""Further figures of language models: the title, and where they are in a part of the summary."""


def _found(own: Mapping[str, Any], path: Sequence[str]) -> float | None:
    part, key = path
    return (own.get(part) or {}).get(key)


def heat_map(
    counts: np.ndarray, clients: Sequence[str], groups: Sequence[str], classes: Sequence[str], width: int
) -> Rows:
    """Client x class counts: numbers where the classes are few, otherwise a shade for one class or several.

    Args:
        counts: examples, clients x classes.
        clients: row names.
        groups: device group of each client.
        classes: class names.
        width: of the terminal, in characters.
    """
    table = Rows(gap=1)
    for name in ("client", "group", "examples"):
        table.add_column(name, justify="right" if name == "examples" else "left", no_wrap=True)
    room = max(width - max(map(len, clients)) - max(map(len, groups)) - 13, 10)
    few = 5 * len(classes) <= room
    per_shade = -(-len(classes) // room)
    starts = np.arange(0, len(classes), per_shade)
    shades = np.add.reduceat(counts, starts, axis=1)
    several = f", {per_shade} a column" if per_shade > 1 else ""
    for name in [str(c)[:4] for c in classes] if few else [f"{len(classes)} classes{several}"]:
        table.add_column(name, justify="right" if few else "left", no_wrap=True)
    top = max(int((counts if few else shades).max()), 1)
    for client, group, row, shade in zip(clients, groups, counts, shades, strict=True):
        if few:
            cells = [
                Text(f"{value:>4}", f"on {_color(value / top)}") if value else Text("   ·", "dim") for value in row
            ]
        else:
            cells = [Text("".join(_SHADES[-(-4 * int(value) // top)] for value in shade))]
        table.add_row(client, group, str(int(row.sum())), *cells)
    return table


def _color(part: float) -> str:
    level = round(40 + 120 * part)
    return f"rgb(0,{level},{level})"

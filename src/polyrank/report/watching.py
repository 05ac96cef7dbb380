"""A run or a study that somebody else works on, in words: for ``polyrank watch``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from polyrank.experiment.following import Following
from polyrank.report.screen import Rows
from polyrank.report.terminal import reached, span


def standing(found: Mapping[str, Any]) -> str:
    """A run's present state in a few words.

    Args:
        found: what `polyrank.experiment.following.described` says of it.
    """
    worth = reached(found["metrics"], "validation/")
    measured = f", validation {worth}" if worth is not None else ""
    if found["state"] == "finished":
        return f"done, test {reached(found['summary']['final']['test'])}"
    if found["state"] == "waiting":
        return "waiting"
    words = f"round {found['round']} of {found['rounds']}{measured}"
    if found["state"] == "silent":
        return f"{words}; nothing since {clock(found['heard'])}"
    if found["round"] >= found["rounds"]:
        return f"{words}; on the test split"
    return words if found["left_seconds"] is None else f"{words}, {span(found['left_seconds'])} left"


def silence(run: Following, now: float) -> str:
    """What is said of a run whose folder has not changed for too long."""
    since = f"nothing new since {clock(run.heard())}, {span(now - run.heard())} ago"
    usual = sorted(run.seconds.values())
    took = f", and a round takes {span(usual[len(usual) // 2])}" if usual and run.done < run.rounds() else ""
    return f"{since}{took}: has the run stopped? Still watching"


def cells(found: list[dict[str, Any]]) -> Rows:
    """A study: a row a cell."""
    table = Rows()
    for name in ("method", "setting", "seed", ""):
        table.add_column(name, justify="right" if name == "seed" else "left", no_wrap=True)
    for cell in found:
        style = {"waiting": "dim", "silent": "yellow", "finished": "green"}.get(cell["state"], "")
        table.add_row(cell["method"], setting(cell), str(cell.get("seed", "")), standing(cell), style=style)
    return table


def changed(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each cell of a study whose state is not what it was."""
    states = {cell["run"]: cell["state"] for cell in before}
    for cell in now:
        if states.get(cell["run"]) != cell["state"]:
            label = " ".join(filter(None, (cell["method"], setting(cell), f"seed {cell.get('seed', '-')}")))
            yield f"{label}: {standing(cell)}"


def setting(cell: Mapping[str, Any]) -> str:
    """A cell's place in a grid: ``local.lr=0.001``."""
    return " ".join(f"{key}={value}" for key, value in cell.get("setting", {}).items())


def clock(seconds: float) -> str:
    """A time for people: of today, the hour alone."""
    then, today = time.localtime(seconds), time.localtime()
    same = then[:3] == today[:3]
    return time.strftime("%H:%M:%S" if same else "%Y-%m-%d %H:%M:%S", then)

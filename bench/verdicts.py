"""Figures beside their goals, as benches store them and as they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Verdict = dict[str, Any]

SIGNS = {"at most": "<=", "at least": ">="}


def verdict(
    name: str,
    figure: float,
    sense: str | None = None,
    goal: float | None = None,
    *,
    part: str = "",
    spread: Mapping[str, float] | None = None,
) -> Verdict:
    """One figure beside its goal, if it has one.

    Args:
        name: what was measured.
        figure: what came out.
        sense: ``at most`` or ``at least``.
        goal: the most or the least it should be.
        part: what it is about, where a bench measures several things.
        spread: the ``least`` and the ``most`` over the turns.
    """
    between = {"least": spread["least"], "most": spread["most"]} if spread else {}
    met = None if goal is None else bool(figure <= goal if sense == "at most" else figure >= goal)
    return {"part": part, "name": name, "figure": figure, **between, "sense": sense, "goal": goal, "met": met}


def lines(found: Iterable[Verdict]) -> list[str]:
    """A table for a terminal."""
    rows = [cells(v) for v in found]
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def shown(found: Iterable[Verdict]) -> bool:
    """Prints figures beside goals; whether none is missed."""
    said = list(found)
    print("\n".join(lines(said)), flush=True)
    return all(v["met"] is not False for v in said)


def cells(v: Verdict) -> list[str]:
    return [v["name"], goal(v), figure(v), said(v)]


def goal(v: Verdict) -> str:
    return "" if v["goal"] is None else f"{SIGNS[v['sense']]} {number(v['goal'])}"


def figure(v: Verdict) -> str:
    between = f" ({number(v['least'])} to {number(v['most'])})" if "least" in v else ""
    return f"{number(v['figure'])}{between}"


def said(v: Verdict) -> str:
    return {None: "", True: "met", False: "MISSED"}[v["met"]]


def number(value: float) -> str:
    """Three digits that count; no exponent where none is needed."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

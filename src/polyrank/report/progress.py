"""A run as it goes, in the terminal: rounds as they end, and what the current one is doing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.text import Text

from polyrank.engines.events import Answered, Asked, Event, Phase
from polyrank.report.screen import Rows, Screen
from polyrank.report.terminal import epsilons, reached, size, span
from polyrank.report.text import one_line

_ROWS_SHOWN = 12
_BAR = 30  # characters
_COLUMNS = ("round", "clients", "loss", "validation", "up", "down", "took", "left")
_WORDS = {
    "importance": "measuring which layers matter",
    "server": "the server makes one adapter of the updates",
    "evaluation": "evaluating the adapter",
    "test": "all rounds are done: evaluating on the test split",
}


@dataclass
class _Current:
    """What is known of the round in progress, or of what follows the last one."""

    asked: Asked | None = None
    answered: list[Answered] = field(default_factory=list)
    phase: Phase | None = None
    since: float = field(default_factory=lambda: time.monotonic())


class Progress:
    """Rounds as they end: a live table in a terminal, a line each elsewhere, nothing when silent.

    The live table shows the clients of the round in progress as well, once `told` is told of them.

    Args:
        console: where.
        rounds: of the run.
        done: how many of them are done.
        silent: whether nothing is shown.
    """

    def __init__(self, console: Screen, rounds: int, done: int, *, silent: bool = False) -> None:
        self.console, self.rounds, self.done, self.silent = console, rounds, done, silent
        self.rows: list[dict[str, str]] = []
        self.seconds: list[float] = []
        self.current: _Current | None = None
        self.live: Live | None = None
        self.remarked: set[tuple[str, str]] = set()

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Shows the table until the context ends."""
        if self.silent or not self.console.is_terminal:
            yield self
            return
        with Live(get_renderable=self.view, console=self.console, refresh_per_second=2) as self.live:
            try:
                yield self
            finally:
                self.current = None

    def told(self, event: Event) -> None:
        """What the run is doing just now: a listener of `polyrank.engines.events`."""
        now = self.current or _Current()
        if isinstance(event, Asked):
            now = _Current(event, since=now.since)
        elif isinstance(event, Answered):
            now.answered.append(event)
        else:
            now.phase = event
        self.current = now

    def add(self, record: Mapping[str, Any], seconds: float | None) -> None:
        """One more round, and its seconds where they are known. Whom the server does not believe is named once."""
        self.seconds += [] if seconds is None else [seconds]
        self.done, self.current = record["round"] + 1, _Current()
        up, down, metrics = (record.get(key) or {} for key in ("bytes_up", "bytes_down", "metrics"))
        losses = [loss for loss in (record.get("losses") or {}).values() if loss is not None]
        row = {
            "round": f"{self.done}/{self.rounds}",
            "clients": f"{len(up)}/{len(down)}",
            "loss": f"{np.mean(losses):.4f}" if losses else "-",
            "validation": reached(metrics, "validation/") or "-",
            **epsilons({key: metrics.get(f"privacy/{key}") for key in ("clients", "examples")}),
            "up": size(sum(up.values())),
            "down": size(sum(down.values())),
            "took": "-" if seconds is None else span(seconds),
            "left": "-" if (left := self.left()) is None else span(left),
        }
        self.rows.append(row)
        if self.live is not None:
            self.live.refresh()
        else:
            self.note("  ".join(f"{name} {value}" for name, value in row.items()))
        self._remark(record)

    def _remark(self, record: Mapping[str, Any]) -> None:
        for key, words in (("refused", "not used"), ("bounded", "counts as less")):
            for client, reason in (record.get(key) or {}).items():
                if (key, client) not in self.remarked and not self.silent:
                    self.remarked.add((key, client))
                    self.console.say(f"{client}: {words} in round {self.done}: {reason}")

    def began(self, ago: float) -> None:
        """The round in progress began so many seconds ago, where it did not with the end of the one before."""
        self.current = self.current or _Current()
        self.current.since = time.monotonic() - ago

    def note(self, line: str) -> None:
        """A line, where there is no live table that shows the same."""
        if self.live is None and not self.silent:
            self.console.say(line)

    def left(self) -> float | None:
        """Seconds that the remaining rounds will take: as the median round, or, in the first, as its clients so far."""
        now, remaining = self.current or _Current(), self.rounds - self.done
        elapsed = time.monotonic() - now.since
        if self.seconds:
            return max(float(np.median(self.seconds)) * remaining - elapsed, 0.0)
        if now.asked is None or not now.answered:
            return None
        return elapsed * (len(now.asked.bytes_down) / len(now.answered) * remaining - 1)

    def view(self) -> Group:
        """The table as it is now: it fits into the terminal."""
        now, room = self.current, max(self.console.height - 5, 4)
        cohort = len(now.asked.bytes_down) if now and now.asked else 0
        clients = min(cohort, room // 2)
        shown = self.rows[-min(_ROWS_SHOWN, room - clients) :]
        table = Rows()
        for name in self.rows[-1] if self.rows else _COLUMNS:
            table.add_column(name, justify="right")
        for row in shown:
            table.add_row(*row.values())
        parts: list[Any] = [table, _bar(self.done, self.rounds)]
        if now is not None:
            parts.append(Text(one_line(self._doing(now)), "dim"))
            if clients and now.asked:
                parts.append(_clients(now.asked, list(now.answered), clients))
        return Group(*parts)

    def _doing(self, now: _Current) -> str:
        phase, words = now.phase, []
        if self.done < self.rounds:
            words.append(f"round {self.done + 1}")
        if phase is not None:
            words.append(_WORDS.get(phase.name, phase.name) + (f", {phase.done} of {phase.of}" if phase.of else ""))
        elif now.asked is not None:
            words.append(f"{len(now.answered)} of {len(now.asked.bytes_down)} clients are done")
        line = ": ".join(words)
        left = self.left() if self.done < self.rounds else None
        times = [f"for {span(time.monotonic() - now.since)}", *([f"{span(left)} left"] if left is not None else [])]
        return f"{line} ({', '.join(times)})" if line else ""


def _bar(done: int, of: int) -> Text:
    full = round(_BAR * done / of) if of else _BAR
    return Text("━" * full, "green") + Text("━" * (_BAR - full), "dim")


def _clients(asked: Asked, answered: list[Answered], rows: int) -> Rows:
    """The cohort, as many as have room: where not all have, those that were last done."""
    found = {answer.client: answer for answer in answered}
    shown = list(asked.bytes_down) if len(asked.bytes_down) <= rows else list(found)[-rows:]
    timed = any(answer.seconds is not None for answer in answered)
    table = Rows()
    for name in ("client", "group"):
        table.add_column(name, no_wrap=True)
    for name in ("down", "loss", "up", *(["simulated"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for client in shown:
        known = [client, asked.groups[client], size(asked.bytes_down[client])]
        answer = found.get(client)
        if answer is None:
            table.add_row(*known, style="dim")
            continue
        loss = "-" if answer.loss is None else f"{answer.loss:.4f}"
        seconds = [] if answer.seconds is None else [span(answer.seconds)]
        table.add_row(*known, loss, size(answer.bytes_up), *seconds)
    return table

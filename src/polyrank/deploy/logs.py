"""Logs of a server and of a node: their ends, and what is added to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from polyrank.deploy import control
from polyrank.deploy.layout import DeployError, Deployment, Node


def logs(place: Deployment | Node, who: str | None) -> dict[str, Path]:
    """Log files by the name of who writes them: all, or one.

    Raises:
        DeployError: if there is none of that name.
    """
    found = {path.stem: path for path in sorted(place.logs.glob("*.log"))}
    if (place.run / "supervisor.log").is_file():
        found["supervisor"] = place.run / "supervisor.log"
    if who is None:
        return found
    if who not in found:
        raise DeployError(f"{who!r}: no log of that name; there are {', '.join(found) or 'none yet'}")
    return {who: found[who]}


def last(place: Deployment | Node, who: str | None, lines: int) -> list[str]:
    """The last lines of each log, with its name in front where there are several."""
    found = logs(place, who)
    shown = []
    for name, path in found.items():
        text = control.plain(path.read_text(encoding="utf-8", errors="replace")).splitlines()
        shown += [_named(name, line, len(found)) for line in text[max(len(text) - lines, 0) :]]
    return shown


def written(place: Deployment | Node, who: str | None, lines: int) -> Iterator[str]:
    """The last lines of each log, then what is added to them, without end."""
    found = logs(place, who)
    ends = {name: _End(path) for name, path in found.items()}
    yield from last(place, who, lines)
    while True:
        for name, end in ends.items():
            for line in control.plain(end.more().decode(errors="replace")).splitlines():
                yield _named(name, line, len(found))
        time.sleep(0.5)


class _End:
    """The end of a log that grows, and is set aside when it is large."""

    def __init__(self, path: Path) -> None:
        self.path, self.read, self.file = path, path.stat().st_size, path.stat().st_ino

    def more(self) -> bytes:
        """Whole lines that were added since the last call, also to the file that was set aside."""
        text, aside = b"", self.path.with_suffix(".log.1")
        if not self.path.is_file():
            return text
        now = self.path.stat()
        if now.st_ino != self.file:
            if aside.is_file() and aside.stat().st_ino == self.file:
                text = _after(aside, self.read)
            self.read, self.file = 0, now.st_ino
        elif now.st_size < self.read:
            self.read = 0
        fresh = _after(self.path, self.read)
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self.read += len(whole)
        return text + whole


def _after(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read()


def lines_of_run(deployment: Deployment, run_id: str) -> list[str]:
    """What a run's ServerApp has printed."""
    return control.log_lines(deployment, run_id)


def _named(name: str, line: str, count: int) -> str:
    return f"{name}: {line}" if count > 1 else line

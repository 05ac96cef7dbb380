"""A run as its folder tells it while somebody else writes it, here or elsewhere; no torch, and nothing is written.

A copy that is made again and again, as by rsync, may be ahead in one file and behind in another, and a line may be half
there: what is not whole is not there yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.files import from_json

Record = dict[str, Any]
State = Literal["waiting", "running", "silent", "finished"]

_LEAST = 60.0  # seconds without a round after which a run with short rounds is silent
_UNKNOWN = 600.0  # of one that has had none yet, or is past the last
_LONGER = 10  # median rounds after which one with long rounds is


class Following:
    """One run's folder, read as it grows.

    Args:
        folder: the run's; it may not be there yet.
        first: the first round to tell of.

    Attributes:
        done: rounds that have ended.
        seconds: those that they took, as far as is known.
        last: the record of the last of them.
    """

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.folder, self.done = folder, first
        self.seconds: dict[int, float] = {}
        self.last: Record | None = None
        self._rounds, self._timings = (
            _Tail(folder / "rounds.jsonl", shapes.Round),
            _Tail(folder / "timings.jsonl", shapes.Timing),
        )
        self._held: Record | None = None  # a record whose seconds have not come
        self._plan: Record = {}

    def ended(self) -> Iterator[tuple[Record, float | None]]:
        """The rounds that have ended since the last call, each once, with its seconds.

        Those of the last round may still be on their way; it is told of when they come, or when there is more.
        """
        self.seconds |= {line["round"]: line["wall_seconds"] for line in self._timings.lines()}
        fresh = [line for line in self._rounds.lines() if line["round"] >= self.done]
        held, self._held = [] if self._held is None else [self._held], None
        found = {record["round"]: record for record in [*held, *fresh]}
        for number in sorted(found):
            late = number not in self.seconds and number == max(found)
            if late and self._timings.path.is_file() and not self.summary():
                self._held = found[number]
                return
            self.done, self.last = number + 1, found[number]
            yield found[number], self.seconds.get(number)

    def read(self) -> None:
        """Takes note of the rounds that have ended, for who does not want to be told of each."""
        for _ in self.ended():
            pass

    def plan(self) -> Record:
        """The resolved experiment, as plain values; empty before the run has begun.

        Raises:
            InputError: if the file is not an experiment.
        """
        path = self.folder / "experiment.yaml"
        if not self._plan and path.is_file():
            self._plan = shapes.read_plan(path)
            if "rounds" not in self._plan:
                raise InputError(f"{path}: not a resolved experiment: rounds: missing")
        return self._plan

    def rounds(self) -> int:
        """How many the run has."""
        plan = self.plan()
        return 0 if plan.get("regime") == "zero_shot" else int(plan.get("rounds", 0))

    def method(self) -> str:
        """What runs: the method, or what stands in its place."""
        plan = self.plan()
        regime = plan.get("regime", "federated")
        method = plan.get("method", {})
        return str(regime if regime != "federated" else method.get("name", "") if isinstance(method, dict) else method)

    def summary(self, needs: Sequence[str] = ()) -> Record | None:
        """The summary of a finished run.

        Args:
            needs: keys that it must have.

        Raises:
            InputError: if it is none.
        """
        path = self.folder / "summary.json"
        found = _json(path)
        if found is not None:
            shapes.check(shapes.Summary, found, str(path), needs)
        return found

    def state(self, now: float | None = None) -> State:
        """Whether the run has not begun, goes on, says nothing for much longer than a round takes, or has finished.

        Args:
            now: seconds since the epoch.
        """
        if (self.folder / "summary.json").is_file() and self.summary() is not None:
            return "finished"
        if not (self.folder / "experiment.yaml").is_file():
            return "waiting"
        return "silent" if (now or time.time()) - self.heard() > self.patience() else "running"

    def heard(self) -> float:
        """When the folder last changed, in seconds since the epoch."""
        names = ("experiment.yaml", "rounds.jsonl", "timings.jsonl", "state/checkpoint.safetensors")
        return max((path.stat().st_mtime for path in map(self.folder.joinpath, names) if path.is_file()), default=0.0)

    def patience(self) -> float:
        """Seconds without a change after which the run counts as silent."""
        if not self.seconds:
            return _UNKNOWN
        if self.done >= self.rounds():  # the test split, and baselines that are trained
            return max(_UNKNOWN, 5 * sum(self.seconds.values()))
        return max(_LEAST, _LONGER * median(self.seconds.values()))

    def left(self, now: float | None = None) -> float | None:
        """Seconds that the remaining rounds will take, by the median of those that have ended."""
        if not self.seconds:
            return None
        after = max((now or time.time()) - self.heard(), 0.0)
        return max(median(self.seconds.values()) * (self.rounds() - self.done) - after, 0.0)


def study(folder: Path) -> dict[str, Any] | None:
    """A study's ``study.json``: its name and its cells; None where the folder is none.

    Raises:
        InputError: if the file is not one.
    """
    path = folder / "study.json"
    if not path.is_file():
        return None
    found = _json(path)
    shapes.check(shapes.Study, found, f"{path}: not a study")
    return found


class _Tail:
    """The whole lines of a file that grows, or is replaced, each time those that are new."""

    def __init__(self, path: Path, shape: Any) -> None:
        self.path, self.shape, self.read, self.file = path, shape, 0, -1

    def lines(self) -> list[Record]:
        """New lines; all of them again where the file is another one, as a line that is none says that it may be."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            size, number = (status := self.path.stat()).st_size, status.st_ino
            if number != self.file or size < self.read:
                self.file, self.read = number, 0
            file.seek(self.read)
            text = file.read()
        found: list[Record] = []
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                value = from_json(line)
            except ValueError:
                self.file = -1
                break
            shapes.check(self.shape, value, str(self.path))
            found.append(value)
            self.read += len(line)
        return found


def _json(path: Path) -> Record | None:
    """An object in a file; None where it is not there, or not whole yet."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def described(run: Following, cell: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run's present state, for programs.

    Args:
        run: after its rounds have been read.
        cell: of a study, whose setting and seed are given as well.
    """
    state, summary = run.state(), run.summary(shapes.SUMMARY_KEYS)
    return {
        "run": str(run.folder),
        "method": (cell or {}).get("method") or run.method(),
        **({key: cell[key] for key in ("setting", "seed") if key in cell} if cell else {}),
        "state": state,
        "round": run.done,
        "rounds": run.rounds(),
        "metrics": (run.last.get("metrics") or {}) if run.last else {},
        "heard": None if state == "waiting" else round(run.heard(), 3),
        "left_seconds": run.left() if state == "running" else None,
        **({"summary": summary} if state == "finished" else {}),
    }

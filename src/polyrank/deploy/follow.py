"""A run of a deployment: submitted, followed to its end, submitted again while it makes progress."""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import TypedDict

from polyrank.deploy import control
from polyrank.deploy.control import ControlError
from polyrank.deploy.layout import DeployError, Deployment
from polyrank.experiment import shapes
from polyrank.experiment.following import Following
from polyrank.files import append_line

if TYPE_CHECKING:
    from polyrank.experiment.store import Run  # heavy

COMPLETED, STOPPED, LOST = "finished:completed", "finished:stopped", "lost"
ATTEMPTS = 10
_SILENCE = 180.0  # seconds for which the SuperLink may be away
_ERROR_LINES = 20
_TURN = 5.0  # seconds between looks whether another run has ended
Say = Callable[[str], None]


class NotSubmittedError(KeyboardInterrupt):
    """Somebody has stopped waiting for a run's turn."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id: Flower's, of the last submission.
        status: as Flower says; ``lost`` where the SuperLink does not know the run any more.
        finished: whether the run's folder has its summary, which is the last thing written.
        details: why, as Flower says.
        errors: the last lines that the ServerApp printed, of a run that did not complete.
    """

    run_id: str
    status: str
    finished: bool
    details: str = ""
    errors: tuple[str, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether Flower says that it completed, and the folder says so, too."""
        return self.status == COMPLETED and self.finished

    def __str__(self) -> str:
        if self.status == COMPLETED and not self.finished:
            return f"run {self.run_id} ended without a summary"
        why = f": {self.details}" if self.details not in ("", "N/A") else ""
        return f"run {self.run_id} is {self.status}{why}"


class Submission(TypedDict):
    """A line of the book of runs: Flower's id, and the run's folder."""

    id: str
    folder: str


class Shown(Protocol):
    """Who is told of rounds as they end, for example `polyrank.report.progress.Progress`."""

    def add(self, record: Mapping[str, Any], seconds: float | None) -> None: ...


def submit(deployment: Deployment, stored: Run) -> str:
    """Submits a run on a folder, which goes on from its last checkpoint; returns Flower's id of it.

    Raises:
        DeployError: if the folder's path cannot be told to Flower, or the SuperLink refuses.
    """
    folder = str(stored.folder.resolve())
    if re.search(r"[\"'\\\n]", folder):
        raise DeployError(f"{folder}: Flower cannot be told a path with quotes or backslashes")
    run_id = control.start_run(deployment, folder)
    append_line(_book(deployment), json.dumps({"id": run_id, "folder": folder}))
    return run_id


def submit_in_turn(deployment: Deployment, stored: Run, say: Say) -> str:
    """Submits a run once no other one works on the federation; returns Flower's id of it.

    One run at a time: a site holds one model and the answer to its last task, so that nothing is trained or released
    twice. Two runs would have it load a model for every message, and train a task again that it has answered.

    Args:
        deployment: the server's.
        stored: the run's folder.
        say: is told which run is waited for.

    Raises:
        NotSubmittedError: if somebody interrupts the wait.
        DeployError: as `submit`.
    """
    named, waits = None, True
    try:
        while True:
            with _alone(deployment):
                other = working(deployment)
                if other is None:
                    waits = False
                    return submit(deployment, stored)
            if other != named:
                folder = submitted(deployment).get(other)
                end = f"; `polyrank deploy stop {deployment.folder} {folder}` ends it" if folder else ""
                say(f"run {other} works on this federation, one run at a time: this one waits for its turn{end}")
                named = other
            time.sleep(_TURN)
    except KeyboardInterrupt:
        if waits:
            raise NotSubmittedError from None
        raise


def working(deployment: Deployment) -> str | None:
    """Flower's id of a run that has not ended, whoever submitted it."""
    return next((key for key, state in control.statuses(deployment).items() if not state.startswith("finished")), None)


@contextmanager
def _alone(deployment: Deployment) -> Iterator[None]:
    """Keeps other processes from submitting, so that two that look at once do not both find nobody at work."""
    with open(deployment.folder / "state" / "submit.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def submitted(deployment: Deployment) -> dict[str, str]:
    """Folders of all runs that were submitted, by Flower's id, in order."""
    return {entry["id"]: entry["folder"] for entry in shapes.read_lines(_book(deployment), Submission, "a run")}


def active(deployment: Deployment, stored: Run) -> str | None:
    """Flower's id of the submission that works on a folder now, if one does."""
    folder = str(stored.folder.resolve())
    for run_id in reversed([key for key, value in submitted(deployment).items() if value == folder]):
        found = control.status(deployment, run_id)
        if found is not None and not found[0].startswith("finished"):
            return run_id
    return None


def stop(deployment: Deployment, stored: Run) -> str:
    """Stops the submission that works on a folder; returns its id. The run can be resumed.

    Raises:
        DeployError: if none does.
    """
    run_id = active(deployment, stored)
    if run_id is None:
        raise DeployError(f"{stored.folder}: no run is working on it")
    control.stop_run(deployment, run_id)
    return run_id


def follow(deployment: Deployment, run_id: str, stored: Run, shown: Shown, first: int = 0) -> Outcome:
    """Follows a submission to its end.

    Args:
        deployment: the server's.
        run_id: Flower's id of it.
        stored: the folder it works on.
        shown: is told of every round once, as the folder's records say.
        first: the first round to tell of.

    Raises:
        DeployError: if the SuperLink does not answer any more.
    """
    started = asked = heard = time.monotonic()
    following = Following(stored.folder, first)
    while True:
        for record, seconds in following.ended():
            shown.add(record, seconds)
        now = time.monotonic()
        # Asking takes a second of processor time, so a long run is asked less often; one that seems done, soon.
        if now - asked > (1 if stored.summary_file.is_file() else min(2 + (now - started) / 20, 10)):
            try:
                found = control.status(deployment, run_id)
                heard = time.monotonic()
            except ControlError as error:
                if now - heard > _SILENCE:
                    raise DeployError(f"the SuperLink has not answered for {_SILENCE:.0f} s: {error}") from None
            else:
                if found is None or found[0].startswith("finished"):
                    for record, seconds in following.ended():
                        shown.add(record, seconds)
                    return _outcome(deployment, run_id, stored, found)
            asked = time.monotonic()
        time.sleep(0.3)


def drive(
    deployment: Deployment,
    stored: Run,
    shown: Shown,
    *,
    say: Say = lambda text: None,
    waits: Say = lambda text: None,
    attempts: int = ATTEMPTS,
) -> Outcome:
    """Follows a run to its end, and submits it again after failures between which it made progress.

    Args:
        deployment: the server's.
        stored: the run's folder; a submission that works on it already is followed, and not doubled.
        shown: is told of every round once.
        say: is told of submissions.
        waits: is told of a run that works on the federation and is waited for.
        attempts: most submissions.
    """
    first = done = _done(stored)
    run_id = active(deployment, stored)
    for attempt in range(attempts):
        if run_id is None:
            run_id = submit_in_turn(deployment, stored, waits)
            say(f"submitted as run {run_id}" + (f", from round {done + 1}" if done else ""))
        else:
            say(f"following run {run_id}")
        outcome = follow(deployment, run_id, stored, shown, first)
        before, done, run_id = done, _done(stored), None
        first = max(first, done)
        if outcome.completed or outcome.status == STOPPED or done <= before or attempt == attempts - 1:
            break
        say(f"{outcome}; it had got on to round {done}, so it is submitted again")
    return outcome


def _outcome(deployment: Deployment, run_id: str, stored: Run, found: tuple[str, str] | None) -> Outcome:
    status, details = found or (LOST, "the SuperLink does not know it")
    finished = stored.summary_file.is_file()
    if status == COMPLETED and finished:
        return Outcome(run_id, status, finished, details)
    try:
        lines = control.log_lines(deployment, run_id) if found else []
    except ControlError:
        lines = []
    return Outcome(run_id, status, finished, details, tuple(_complaint(lines)))


def _complaint(lines: list[str]) -> list[str]:
    """The last traceback of a log, or its last lines."""
    lines = [line for line in lines if line.strip()]
    starts = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return lines[starts[-1] :][-_ERROR_LINES:] if starts else lines[-_ERROR_LINES:]


def _done(stored: Run) -> int:
    """Rounds that a folder has records of."""
    return sum(1 for _ in stored.records())


def _book(deployment: Deployment) -> Path:
    return deployment.folder / "state" / "runs.jsonl"

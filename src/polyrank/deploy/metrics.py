"""What a monitoring system is told of a server: rounds, answers, bytes, sites, certificates, disks.

Values are read from the folders of the runs that were submitted, as they grow, and from pid files and certificates.
Who is connected and which runs go on is asked of Flower once a minute, because its command takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from polyrank import __version__
from polyrank.deploy import control, expiry, operate, registry
from polyrank.deploy.exposition import Family, exposition, server
from polyrank.deploy.follow import submitted
from polyrank.deploy.layout import LOOPBACK, DeployError, Deployment
from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.experiment.following import Following
from polyrank.files import from_json

OUTCOMES = ("accepted", "refused", "late", "failed", "unanswered")
_EVERY = 60.0  # seconds between questions to Flower
_AGAIN = 3.0  # after one that it has not answered
_KINDS = 30  # most reasons of refusals that are told apart in a run; a site words a part of them
_LONGEST = 100  # characters of a reason


class Entry(TypedDict):
    """A line of audit.jsonl, as far as it is counted."""

    event: str
    reason: NotRequired[str]


@dataclass
class RunCount:
    """What has happened in a run until now.

    Attributes:
        folder: the run's.
        following: its records.
        rounds: those that have ended.
        seconds: which those took whose time is known, and how many these are.
        bytes_up: from clients to the server, of the rounds' updates.
        bytes_down: from the server to clients.
        answers: how many had which outcome.
        refusals: how many were refused, by reason without its numbers and names.
        readable: whether the files could be read the last time.
    """

    folder: Path
    following: Following = field(init=False)
    rounds: int = 0
    seconds: tuple[float, int] = (0.0, 0)
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    readable: bool = True
    _read: int = 0  # bytes of the audit

    def __post_init__(self) -> None:
        self.following = Following(self.folder)

    def update(self) -> None:
        """Counts what is new."""
        try:
            for record, seconds in self.following.ended():
                self.rounds += 1
                self.bytes_up += sum(record["bytes_up"].values())
                self.bytes_down += sum(record["bytes_down"].values())
                if seconds is not None:
                    self.seconds = (self.seconds[0] + seconds, self.seconds[1] + 1)
            self._audit()
            self.readable = True
        except (InputError, OSError, KeyError):
            self.readable = False

    def _audit(self) -> None:
        path = self.folder / "audit.jsonl"
        if not path.is_file():
            return
        with open(path, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                entry = from_json(line)
            except ValueError:
                continue  # cut short by a crash
            shapes.check(Entry, entry, str(path))
            if entry["event"] in OUTCOMES:
                self.answers[entry["event"]] += 1
            if entry["event"] == "refused":
                kind = kind_of(entry.get("reason", ""))
                self.refusals[kind if kind in self.refusals or len(self.refusals) < _KINDS else "other"] += 1
        self._read += len(whole)


def kind_of(reason: str) -> str:
    """A reason without what differs from one client to the next: quoted names, hashes, numbers.

    >>> kind_of("examples: 12.5 of 'north' is not a number that it can be")
    "examples: N of '*' is not a number that it can be"
    """
    plain = re.sub(r"(?<!\w)'[^']*'", "'*'", reason)
    plain = re.sub(r"\b(?=\w*\d)[\w.+-]*\w", "N", plain)
    return plain[:_LONGEST] or "unknown"


class Metrics:
    """The metrics of a server.

    Args:
        deployment: its folder.
        ask: gives what Flower says of nodes, by name, and of runs, by id.
    """

    def __init__(
        self, deployment: Deployment, ask: Callable[[Deployment], tuple[dict[str, str], dict[str, str]]] | None = None
    ) -> None:
        self.folder, self._ask = deployment.folder, ask or _answer
        self._runs: dict[str, RunCount] = {}
        self._nodes: dict[str, str] = {}
        self._states: dict[str, str] = {}
        self._heard = 0.0  # since the epoch, when Flower last answered
        self._lock = threading.Lock()

    def ask(self) -> bool:
        """Asks Flower who is connected and which runs go on; whether it answers. If not, what it said before stays."""
        try:
            self._nodes, self._states = self._ask(Deployment(self.folder))
        except (DeployError, OSError):
            return False
        self._heard = time.time()
        return True

    def page(self) -> bytes:
        """All metrics now, in Prometheus' text format."""
        with self._lock:
            return exposition(self.families())

    def families(self) -> list[Family]:
        """All metrics now."""
        deployment = Deployment(self.folder)
        runs = submitted(deployment)
        for folder in runs.values():
            self._runs.setdefault(folder, RunCount(Path(folder))).update()
        return [
            *_about(),
            *self._server(deployment),
            *_deadlines(deployment),
            *self._of_runs({folder: run_id for run_id, folder in runs.items()}),
            *_disks([self.folder, *(run.folder for run in self._runs.values())], self.folder),
        ]

    def _server(self, deployment: Deployment) -> list[Family]:
        answers = Family("polyrank_superlink_up", "gauge", "1 if the SuperLink answers.")
        answers.add(operate.healthy(deployment, deployment.settings.superlink_port))
        heard = Family("polyrank_flower_answer_timestamp_seconds", "gauge", "When Flower last said who is connected.")
        heard.add(self._heard)
        known = Family("polyrank_sites_known", "gauge", "Sites of this federation.")
        names = registry.names(deployment)
        known.add(len(names))
        connected = Family("polyrank_sites_connected", "gauge", "Sites that are connected.")
        one = Family("polyrank_site_connected", "gauge", "1 if this site is connected.")
        states = [self._nodes.get(name) == "online" for name in names]
        connected.add(sum(states))
        for name, state in zip(names, states, strict=True):
            one.add(state, site=name)
        kept = Family("polyrank_process_up", "gauge", "1 if this process of the server runs; none under systemd.")
        for name, pid in operate.processes(deployment).items():
            kept.add(pid is not None, process=name)
        return [answers, heard, known, connected, one, kept]

    def _of_runs(self, last: dict[str, str]) -> list[Family]:
        """Of every run's folder; `last` is Flower's id of its last submission."""
        active = Family("polyrank_run_active", "gauge", "1 if Flower works on this run or will.")
        readable = Family("polyrank_run_readable", "gauge", "0 if the files of this run cannot be read.")
        changed = Family("polyrank_run_changed_timestamp_seconds", "gauge", "When this run last wrote a round.")
        planned = Family("polyrank_rounds_planned", "gauge", "Rounds of this run.")
        rounds = Family("polyrank_rounds_total", "counter", "Rounds that have ended.")
        seconds = Family("polyrank_round_seconds", "summary", "Seconds that rounds took.")
        answers = Family("polyrank_answers_total", "counter", "Answers of clients, by what became of them.")
        refusals = Family("polyrank_refusals_total", "counter", "Answers that were refused, by reason.")
        up = Family("polyrank_bytes_up_total", "counter", "Bytes of updates, from clients to the server.")
        down = Family("polyrank_bytes_down_total", "counter", "Bytes of tasks, from the server to clients.")
        for name, run in self._runs.items():
            state = self._states.get(last.get(name, ""), "finished")
            active.add(not state.startswith("finished"), run=name)
            readable.add(run.readable, run=name)
            rounds.add(run.rounds, run=name)
            for ending, value in zip(("_sum", "_count"), run.seconds, strict=True):
                seconds.add(value, ending, run=name)
            for outcome in OUTCOMES:
                answers.add(run.answers[outcome], run=name, outcome=outcome)
            for reason, count in run.refusals.items():
                refusals.add(count, run=name, reason=reason)
            up.add(run.bytes_up, run=name)
            down.add(run.bytes_down, run=name)
            if run.readable:
                changed.add(run.following.heard(), run=name)
                planned.add(run.following.rounds(), run=name)
        return [active, readable, changed, planned, rounds, seconds, answers, refusals, up, down]


def serve(deployment: Deployment) -> None:
    """Answers on the port that the settings name, until this process is told to end.

    Raises:
        DeployError: if the settings name none, or it is taken.
    """
    port = deployment.settings.metrics_port
    if port is None:
        raise DeployError(f"{deployment.folder / 'deploy.json'}: metrics_port: missing; give a port, for example 9464")
    metrics = Metrics(deployment)
    try:
        web = server((LOOPBACK, port), metrics.page)
    except OSError as error:
        raise DeployError(f"metrics_port: port {port} of {LOOPBACK} cannot be listened on: {error.strerror}") from None
    threading.Thread(target=_ask_always, args=(metrics,), daemon=True).start()
    with web:
        web.serve_forever()


def _ask_always(metrics: Metrics) -> None:
    deployment = Deployment(metrics.folder)
    while True:
        answers = operate.healthy(deployment, deployment.settings.superlink_port) and metrics.ask()
        time.sleep(_EVERY if answers else _AGAIN)


def _answer(deployment: Deployment) -> tuple[dict[str, str], dict[str, str]]:
    return operate.online(deployment), control.statuses(deployment)


def _about() -> list[Family]:
    info = Family("polyrank_info", "gauge", "Versions; the value is 1.")
    versions = {"version": __version__, "python": platform.python_version()}
    info.add(1, **versions, **{name: importlib.metadata.version(name) for name in ("torch", "flwr")})
    return [info]


def _deadlines(deployment: Deployment) -> list[Family]:
    days = Family("polyrank_certificate_days", "gauge", "Days until a certificate of the server ends.")
    keys = Family("polyrank_site_key_days", "gauge", "Days until the key of this site ends; below 0 if it has ended.")
    left: dict[str, float] = {}
    for deadline in expiry.of_server(deployment):
        value = (deadline.until - deadline.now).total_seconds() / 86_400
        if deadline.site is None:
            days.add(value, certificate=deadline.what.removesuffix(" certificate"))
        else:
            left[deadline.site] = value  # the last: a site whose keys have ended more than once is there for each
    for name, value in left.items():
        keys.add(value, site=name)
    return [days, keys]


def _disks(folders: list[Path], first: Path) -> list[Family]:
    """Once for each file system, under the first folder on it."""
    free = Family("polyrank_disk_free_bytes", "gauge", "Bytes that are free where this folder is.")
    size = Family("polyrank_disk_size_bytes", "gauge", "Bytes of the file system where this folder is.")
    database = Family("polyrank_database_bytes", "gauge", "Bytes of Flower's database.")
    seen: dict[int, Any] = {}
    for folder in folders:
        if folder.is_dir() and (device := folder.stat().st_dev) not in seen:
            seen[device] = usage = shutil.disk_usage(folder)
            free.add(usage.free, folder=str(folder))
            size.add(usage.total, folder=str(folder))
    files = [path for path in (first / "state").glob("superlink.db*") if path.is_file()]
    database.add(sum(path.stat().st_size for path in files))
    return [free, size, database]

"""Keeps processes running in the background, and ends them: pid files, logs, restarts.

``python -P supervise.py FOLDER`` reads ``FOLDER/services.json`` and runs what it lists until it is told to stop. It is
run as a file, and knows the standard library alone, so that a supervisor takes some megabytes and not those of torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

SUPERVISOR = "supervisor"
_SETTLED = 60.0  # seconds after which a process counts as started well
_LONGEST_PAUSE = 10.0  # seconds between restarts; the first is 1 s, and each is twice as long as the one before
_GRACE = 15.0  # seconds between asking a process to end and ending it
_LOG_BYTES = 20_000_000  # a log that would be larger is set aside, in place of the one before
_PIECE = 65_536  # bytes of output that are taken at once


@dataclass(frozen=True)
class Service:
    """A process to keep running.

    Attributes:
        name: of its pid file and its log.
        command: the program, by its path, and its arguments.
        cwd: its working directory.
        log: where its output goes.
    """

    name: str
    command: Sequence[str]
    cwd: str
    log: str


def start(folder: Path, services: Sequence[Service], environment: Mapping[str, str]) -> None:
    """Starts a supervisor of these services, detached from this process.

    Args:
        folder: for its pid files.
        services: started in this order and ended in the reverse.
        environment: all variables that the services have. They are handed on, and not stored.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stored = folder / "services.json"
    try:
        with open(os.open(stored, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump([asdict(service) for service in services], file)
    except OSError as error:  # of a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(stored)) from None
    command = [sys.executable, "-P", __file__, str(folder), "--detach"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=folder, env=dict(environment))
    deadline = time.monotonic() + 10
    while not running(folder, SUPERVISOR) and time.monotonic() < deadline:
        time.sleep(0.05)


def stop(folder: Path) -> list[str]:
    """Ends the supervisor whose pid files lie in a folder, and its services; returns the names of what ran.

    A process is ended only if it is the one that the pid file was written for, by the time it started.
    """
    found = [name for name in names(folder) if running(folder, name)]
    if pid := running(folder, SUPERVISOR):
        since = started(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        _until(lambda: started(pid) != since, 3 * _GRACE)
    for name in names(folder):  # what a supervisor that was killed has left
        if running(folder, name):
            _end_group(_read(folder, name)[0])
        (folder / f"{name}.pid").unlink(missing_ok=True)
    return found


def names(folder: Path) -> list[str]:
    """What has a pid file in a folder, the supervisor first."""
    found = sorted(path.stem for path in folder.glob("*.pid"))
    return sorted(found, key=lambda name: name != SUPERVISOR)


def running(folder: Path, name: str) -> int | None:
    """The pid of a process that a pid file names, if it runs and is the one it was written for."""
    pid, since = _read(folder, name)
    return pid if since and started(pid) == since else None


def started(pid: int) -> str | None:
    """When a process started, as a word that no later process with its pid shares; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return None if stat[0] in "ZX" else f"{boot}:{stat[19]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, since = shown.stdout.strip().partition(" ")
    return since.strip() if since and not state.startswith("Z") else None


def supervise(folder: Path, services: Sequence[Service], environment: Mapping[str, str]) -> None:
    """Runs services until this process is told to end, and starts again what ends by itself."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: told.set())
    _write(folder, SUPERVISOR, os.getpid())
    kept = [_Kept(folder, service, environment) for service in services]
    while not told.wait(0.2):
        for each in kept:
            each.check()
    for each in reversed(kept):
        each.end()
    (folder / f"{SUPERVISOR}.pid").unlink(missing_ok=True)


class _Kept:
    """One service: its process, and when to start it again."""

    def __init__(self, folder: Path, service: Service, environment: Mapping[str, str]) -> None:
        self.folder, self.service, self.environment = folder, service, dict(environment)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Log(Path(service.log))
        self.reader: threading.Thread | None = None
        self.failures, self.since, self.next = 0, 0.0, 0.0

    def check(self) -> None:
        """Starts the process if it is time, and notices that it has ended."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.next:
                self._start()
            return
        code = self.process.poll()
        if code is None:
            return
        _end_group(self.process.pid)
        self.failures = 0 if now - self.since > _SETTLED else self.failures + 1
        pause = min(2.0 ** max(self.failures - 1, 0), _LONGEST_PAUSE)
        self._note(f"ended with code {code}; starts again in {pause:.0f} s")
        self.process, self.next = None, now + pause

    def end(self) -> None:
        """Ends the process and all of its group."""
        if self.process is not None:
            _end_group(self.process.pid, self.process)
            if self.reader is not None:
                self.reader.join(1.0)  # its last words
            self._note("stopped")
        (self.folder / f"{self.service.name}.pid").unlink(missing_ok=True)

    def _start(self) -> None:
        self._note("starts")
        self.since = time.monotonic()
        try:
            self.process = subprocess.Popen(
                list(self.service.command),
                env=self.environment,
                cwd=self.service.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._note(f"does not start: {error}")
            self.next = self.since + _LONGEST_PAUSE
            return
        assert self.process.stdout is not None
        self.reader = threading.Thread(target=self.log.take, args=(self.process.stdout,), daemon=True)
        self.reader.start()
        _write(self.folder, self.service.name, self.process.pid)

    def _note(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self.log.write(f"[supervisor] {now} {self.service.name} {text}\n".encode())


class Log:
    """A log of bounded size: what would be too large is set aside as ``NAME.log.1``, in place of the one before.

    A process writes into a pipe, and not into the file, so that it need not know when the file is another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # a process that has escaped from its group may write on beside the next

    def take(self, output: IO[bytes]) -> None:
        """Writes all output of a process, until the last one that has the pipe ends."""
        with output:
            while piece := os.read(output.fileno(), _PIECE):
                self.write(piece)

    def write(self, text: bytes) -> None:
        """Adds to the log. Where the disk is full, the text is lost, and the process goes on."""
        with self._lock, suppress(OSError):
            size = self.path.stat().st_size if self.path.exists() else 0
            if size and size + len(text) > _LOG_BYTES:
                rest = text.find(b"\n") + 1  # a line is not cut in two
                self._add(text[:rest])
                os.replace(self.path, self.path.with_suffix(".log.1"))
                text = text[rest:]
            self._add(text)

    def _add(self, text: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(text)


def _end_group(pid: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Asks all processes of a group to end, waits, and ends what is left."""
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(pid, number)
        except (ProcessLookupError, PermissionError):  # of a group of zombies, macOS says the latter
            break
        if _until(lambda: not _group_alive(pid, process), patience):
            break
    if process is not None:
        process.wait()


def _group_alive(pid: int, process: subprocess.Popen[bytes] | None) -> bool:
    """Whether a process group has a member that is not a zombie."""
    if process is not None:
        process.poll()  # a zombie of ours is a member of its group until it is waited for
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    members = list(_group_members(pid))
    return not members or any(started(member) for member in members)


def _group_members(pid: int) -> Iterator[int]:
    """Members of a process group, where the system lists them in /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            if int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[2]) == pid:
                yield int(stat.parent.name)


def _until(done: Callable[[], bool], patience: float) -> bool:
    """Waits for a condition; whether it came true in time."""
    deadline = time.monotonic() + patience
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _write(folder: Path, name: str, pid: int) -> None:
    path = folder / f"{name}.pid"
    temporary = folder / f".{name}.tmp"
    temporary.write_text(json.dumps({"pid": pid, "started": started(pid)}), encoding="utf-8")
    os.replace(temporary, path)


def _read(folder: Path, name: str) -> tuple[int, str]:
    """The pid in a pid file and when its process started; nothing of a file that is not there or not whole."""
    try:
        found = json.loads((folder / f"{name}.pid").read_text(encoding="utf-8"))
        return int(found["pid"]), found["started"] or ""
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def main(folder: Path, detach: bool) -> None:
    """Runs the services of a folder, in the background if asked."""
    services = [Service(**entry) for entry in json.loads((folder / "services.json").read_text(encoding="utf-8"))]
    os.umask(0o077)
    if detach:
        if os.fork():
            os._exit(0)
        os.setsid()
        output = os.open(folder / f"{SUPERVISOR}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
    supervise(folder, services, os.environ)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--detach" in sys.argv[2:])

"""Processes that are kept running: real ones, small ones."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from polyrank.deploy import supervise
from polyrank.deploy.supervise import SUPERVISOR, Service

SLEEPS = "import time; time.sleep(600)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPS!r}])"


def service(folder: Path, name: str, code: str) -> Service:
    return Service(name, [sys.executable, "-S", "-c", code], str(folder), str(folder / f"{name}.log"))


def soon(true: Callable[[], object], patience: float = 20) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def started(folder: Path, *services: Service) -> dict[str, int]:
    """Pids by name, once all run."""
    supervise.start(folder, services, os.environ)
    wanted = [SUPERVISOR, *(each.name for each in services)]
    soon(lambda: all(supervise.running(folder, name) for name in wanted))
    return {name: pid for name in wanted if (pid := supervise.running(folder, name))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_what_ends_is_started_again_and_stop_ends_all(folder: Path) -> None:
    pids = started(folder, service(folder, "a", SLEEPS), service(folder, "b", PARENT))
    try:
        soon(lambda: psutil.Process(pids["b"]).children())
        below = psutil.Process(pids["b"]).children()[0].pid
        os.kill(pids["a"], signal.SIGKILL)
        soon(lambda: supervise.running(folder, "a") not in (None, pids["a"]))
        again = supervise.running(folder, "a")
        assert supervise.running(folder, "b") == pids["b"]
    finally:
        assert set(supervise.stop(folder)) == {SUPERVISOR, "a", "b"}
    assert again is not None
    assert not any(alive(pid) for pid in (*pids.values(), again, below))
    assert list(folder.glob("*.pid")) == []
    assert "a ended with code -9; starts again in 1 s" in (folder / "a.log").read_text()
    assert supervise.stop(folder) == []


def test_what_a_killed_supervisor_left_is_ended(folder: Path) -> None:
    pids = started(folder, service(folder, "a", PARENT))
    os.kill(pids[SUPERVISOR], signal.SIGKILL)
    soon(lambda: not alive(pids[SUPERVISOR]))
    assert alive(pids["a"])
    assert supervise.stop(folder) == ["a"]
    assert not alive(pids["a"])


def test_a_stranger_with_the_pid_of_a_pid_file_lives(folder: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPS], start_new_session=True)
    try:
        (folder / "a.pid").write_text(json.dumps({"pid": stranger.pid, "started": "some other time"}))
        (folder / "b.pid").write_text("not JSON")
        assert supervise.running(folder, "a") is None
        assert supervise.stop(folder) == []
        assert stranger.poll() is None
        assert list(folder.glob("*.pid")) == []
    finally:
        stranger.kill()
        stranger.wait()


def test_children_end_with_the_process_that_started_them(folder: Path) -> None:
    pids = started(folder, service(folder, "a", PARENT))
    try:
        soon(lambda: psutil.Process(pids["a"]).children())
        below = psutil.Process(pids["a"]).children()[0].pid
        os.kill(pids["a"], signal.SIGKILL)
        soon(lambda: supervise.running(folder, "a") not in (None, pids["a"]))
        assert not alive(below)
    finally:
        supervise.stop(folder)


def test_one_that_cannot_start_does_not_end_the_others(folder: Path) -> None:
    wrong = Service("wrong", ["/no/such/program"], str(folder), str(folder / "wrong.log"))
    supervise.start(folder, [wrong, service(folder, "a", SLEEPS)], os.environ)
    try:
        soon(lambda: supervise.running(folder, "a"))
        assert "wrong does not start" in (folder / "wrong.log").read_text()
    finally:
        supervise.stop(folder)


def test_the_environment_reaches_processes_and_no_file(folder: Path) -> None:
    code = f"import os; open({str(folder / 'seen')!r}, 'w').write(os.environ['TOKEN']); {SLEEPS}"
    supervise.start(folder, [service(folder, "a", code)], {"TOKEN": "s3cret"})
    try:
        soon(lambda: (folder / "seen").exists() and (folder / "seen").read_text())
        assert (folder / "seen").read_text() == "s3cret"
        (folder / "seen").unlink()
        assert not any("s3cret" in path.read_text() for path in folder.iterdir() if path.is_file())
    finally:
        supervise.stop(folder)


NOISE = """
import sys
line = b'%09d ' + b'x' * 89 + b'\\n'
for number in range(500_000):
    sys.stdout.buffer.write(line % number)
sys.stdout.buffer.flush()
open({done!r}, 'w').close()
import time; time.sleep(600)
"""


def test_a_log_is_set_aside_while_its_process_writes_and_no_line_is_lost(folder: Path) -> None:
    log, aside = folder / "a.log", folder / "a.log.1"
    pids = started(folder, service(folder, "a", NOISE.format(done=str(folder / "done"))))
    try:
        soon((folder / "done").exists)
        soon(
            lambda: log.read_bytes().startswith(b"0") and log.read_bytes().rpartition(b"\n")[0][-99:-90] == b"000499999"
        )
        assert supervise.running(folder, "a") == pids["a"]  # it was not started again
    finally:
        supervise.stop(folder)
    assert sorted(path.name for path in folder.glob("a.log*")) == ["a.log", "a.log.1"]
    assert max(path.stat().st_size for path in (log, aside)) <= 20_000_000 + 65_536
    numbers = [int(line[:9]) for path in (aside, log) for line in path.read_bytes().splitlines() if line[:1] == b"0"]
    assert numbers == list(range(numbers[0], 500_000))  # 50 MB were written, and what is left has no gap
    assert len(numbers) > 200_000
    assert b"a stopped" in log.read_bytes().splitlines()[-1]


def test_what_its_children_write_is_in_the_log(folder: Path) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1 + 41)']); {SLEEPS}"
    started(folder, service(folder, "a", code))
    try:
        soon(lambda: "\n42\n" in (folder / "a.log").read_text())
    finally:
        supervise.stop(folder)


def test_a_process_goes_on_when_its_log_cannot_be_written(folder: Path) -> None:
    code = f"print('x' * 200_000, flush=True); open({str(folder / 'on')!r}, 'w').close(); {SLEEPS}"
    (folder / "a.log").symlink_to("/dev/full")
    started(folder, service(folder, "a", code))
    try:
        soon((folder / "on").exists)
    finally:
        supervise.stop(folder)

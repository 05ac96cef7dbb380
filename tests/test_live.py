"""What is seen of a run while it goes: in a terminal, in a log, and by ``polyrank watch``."""

import contextlib
import copy
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.engines.events import Answered, Asked, Event, Phase
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.report.progress import Progress
from polyrank.report.screen import Screen
from sittings import Config, contents, finished, started

COMMAND = [sys.executable, "-m", "polyrank.cli"]
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def row(number: int) -> dict[str, Any]:
    return {
        "round": number,
        "losses": {"a": 1.0, "b": 2.0},
        "metrics": {},
        "bytes_up": {"a": 10, "b": 10},
        "bytes_down": {"a": 20, "b": 20, "c": 20},
    }


def text(progress: Progress) -> str:
    with progress.console.capture() as captured:
        progress.console.print(progress.view())
    return captured.get()


def terminal(height: int = 24) -> Screen:
    return Screen(file=io.StringIO(), force_terminal=True, width=100, height=height, color_system=None)


# --- what the run tells


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> tuple[list[Event], Path]:
    """All that a listener hears of a run, and the run's folder."""
    heard: list[Event] = []
    config = {**copy.deepcopy(digits_config), "rounds": 2, "baselines": ["single", "local"]}
    session = started(tmp_path_factory.mktemp("watched") / "run", config)
    session.listeners.append(heard.append)
    finished(session)
    return heard, session.run.folder


def test_a_listener_hears_of_every_client_and_phase_in_order(events: tuple[list[Event], Path]) -> None:
    heard, folder = events
    kinds = [event.name if isinstance(event, Phase) else type(event).__name__ for event in heard]
    one = ["Asked", *["Answered"] * 4, "server", "evaluation"]
    assert kinds[:15] == [*one, *one, "test"]
    for number, record in enumerate(Run.open(folder).records()):
        asked, *answered = heard[7 * number : 7 * number + 5]
        assert asked == Asked(
            number,
            {"client_0": "small", "client_1": "small", "client_2": "large", "client_3": "large"},
            record["bytes_down"],
        )
        assert {event.client: event.loss for event in answered} == record["losses"]
        assert {event.client: event.bytes_up for event in answered} == record["bytes_up"]
        assert max(event.seconds for event in answered) == record["seconds"]


def test_a_listener_hears_of_the_baselines(events: tuple[list[Event], Path]) -> None:
    heard = [event for event in events[0] if isinstance(event, Phase) and event.of]
    names = list(dict.fromkeys(event.name for event in heard))
    assert names[0] == "baseline single"
    assert all(event.name.startswith("baseline local") for event in heard[2:])
    assert all(event.done <= event.of for event in heard)


def test_a_run_that_is_watched_has_the_bytes_of_one_that_is_not(
    tmp_path: Path, events: tuple[list[Event], Path], digits_config: Config
) -> None:
    config = {**copy.deepcopy(digits_config), "rounds": 2, "baselines": ["single", "local"]}
    alone = started(tmp_path / "run", config)
    finished(alone)
    assert contents(tmp_path / "run") == contents(events[1])


# --- what is shown


def test_the_clients_of_the_round_are_shown() -> None:
    progress = Progress(terminal(), 3, 0)
    progress.told(Asked(0, {"a": "small", "b": "large"}, {"a": 1000, "b": 2000}))
    assert "round 1: 0 of 2 clients are done" in text(progress)
    assert "left" not in text(progress).splitlines()[2]  # nobody knows yet
    progress.told(Answered("a", 1.25, 500, 61.0))
    seen = text(progress)
    assert "round 1: 1 of 2 clients are done" in seen
    (line,) = [line.split() for line in seen.splitlines() if line.startswith("a ")]
    assert line == ["a", "small", "1.0", "kB", "1.2500", "500", "B", "1", "min", "01", "s"]
    progress.told(Phase("evaluation"))
    assert "round 1: evaluating" in text(progress)
    progress.add(row(0), 2.0)
    assert "small" not in text(progress)
    progress.told(Phase("baseline local", 1, 4))
    assert "baseline local, 1 of 4" in text(progress)


@pytest.mark.parametrize("height", [8, 12, 24, 60])
def test_what_is_shown_fits_into_the_terminal(height: int) -> None:
    progress = Progress(terminal(height), 50, 0)
    for number in range(30):
        progress.add(row(number), 1.0)
    progress.told(Asked(30, {f"c{i}": "g" for i in range(40)}, {f"c{i}": 1 for i in range(40)}))
    for i in range(35):
        progress.told(Answered(f"c{i}", None, 1, None))
    seen = text(progress).splitlines()
    assert len(seen) <= height
    assert any(line.startswith("c34 ") for line in seen)
    assert any(line.split()[0] == "30/50" for line in seen)


def test_time_left_follows_the_median_round_and_in_the_first_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("polyrank.report.progress.time", SimpleNamespace(monotonic=lambda: now))
    progress = Progress(terminal(), 10, 0)
    assert progress.left() is None
    progress.told(Asked(0, {"a": "", "b": ""}, {"a": 1, "b": 1}))
    now = 102.0
    progress.told(Answered("a", 1.0, 1, None))
    assert progress.left() == pytest.approx(2 * 2 * 10 - 2)
    for number, seconds in enumerate((4.0, 4.0, 100.0)):
        progress.add(row(number), seconds)
    assert progress.left() == pytest.approx(28)
    now = 103.0
    assert progress.left() == pytest.approx(27)
    progress.began(5.0)
    assert progress.left() == pytest.approx(23)


def test_elsewhere_a_round_is_a_line_and_nothing_else_is() -> None:
    console = Screen(file=io.StringIO(), width=200)
    with Progress(console, 2, 0).shown() as progress:
        progress.told(Asked(0, {"a": ""}, {"a": 1}))
        progress.told(Answered("a", 1.0, 1, None))
        progress.told(Phase("evaluation"))
        progress.add(row(0), 2.0)
    printed = console.file.getvalue()
    assert printed == "round 1/2  clients 2/3  loss 1.5000  validation -  up 20 B  down 60 B  took 2.0 s  left 2.0 s\n"


def in_terminal(*arguments: object) -> tuple[int, str]:
    """Exit status and all that a command wrote to a terminal of 100 x 40."""
    pid, end = pty.fork()
    if not pid:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        os.execv(COMMAND[0], [*COMMAND, *map(str, arguments)])
    seen = b""
    with contextlib.suppress(OSError):  # what Linux says at the end
        while part := os.read(end, 65536):
            seen += part
    os.close(end)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), CODES.sub("", seen.decode())


def test_whom_the_server_does_not_believe_is_named_once() -> None:
    console = Screen(file=io.StringIO(), width=200)
    with Progress(console, 3, 0).shown() as progress:
        for number in range(3):
            refused = {"c1": "left out until its profile changes: states no rank"} if number else {}
            line = {"round": number, "bytes_up": {}, "bytes_down": {}, "refused": refused}
            progress.add({**line, "bounded": {"c2\n": "states 9e+15 examples"}}, 1.0)
    said = [line for line in console.file.getvalue().splitlines() if "round " in line and "clients" not in line]  # type: ignore[attr-defined]
    assert said == [
        "c2\\n: counts as less in round 1: states 9e+15 examples",
        "c1: not used in round 2: left out until its profile changes: states no rank",
    ]


def test_a_terminal_shows_clients_while_they_train_and_rounds_at_the_end(tmp_path: Path, digits_file: Path) -> None:
    sets = ("--set", "rounds=3", "--set", "local.epochs=20", "--set", "simulation.together=off")
    status, seen = in_terminal("run", digits_file, "--out", tmp_path / "run", *sets)
    assert status == 0, seen
    assert re.search(r"round \d: [123] of 4 clients are done", seen)
    assert re.search(r"client_0 +small", seen)
    last = seen[seen.rindex("round  clients") :]
    assert [line.split()[0] for line in last.splitlines()[1:4]] == ["1/3", "2/3", "3/3"]
    assert "client_0" not in last
    assert "fedit, final round" in last


# --- polyrank watch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> Path:
    session = started(tmp_path_factory.mktemp("live") / "run", copy.deepcopy(digits_config))
    finished(session)
    return session.run.folder


def copied(run: Path, folder: Path, rounds: int) -> None:
    """A run as it was after some rounds, when its next line was half written."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("summary.json"))
    for name in ("rounds.jsonl", "timings.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:rounds]) + (lines[rounds][:20] if rounds < len(lines) else ""))


def test_watching_a_finished_run_shows_its_rounds_and_results(run: Path) -> None:
    result = call("watch", run)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == f"fedit, 3 rounds, in {run}"
    assert [line.split("  ")[0] for line in lines[1:4]] == ["round 1/3", "round 2/3", "round 3/3"]
    assert "fedit, final round" in result.output


def test_the_present_state(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "copy", 2)
    assert "fedit: round 2 of 3, validation" in call("watch", tmp_path / "copy", "--once").output
    found = json.loads(call("watch", tmp_path / "copy", "--json").output)
    assert (found["state"], found["round"], found["rounds"]) == ("running", 2, 3)
    found = json.loads(call("watch", run, "--json").output)
    assert (found["state"], found["round"]) == ("finished", 3)
    assert found["summary"] == json.loads((run / "summary.json").read_text())
    assert "fedit: done, test" in call("watch", run, "--once").output


def watching(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "watch", str(folder), "--every", "0.1", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_copy_is_followed_while_it_grows(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "copy", 1)
    with watching(tmp_path / "copy") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("fedit, 3 rounds")
        assert process.stdout.readline().startswith("round 1/3")
        for name in ("rounds.jsonl", "timings.jsonl"):
            shutil.copy(run / name, tmp_path / "copy" / f"new-{name}")
            os.replace(tmp_path / "copy" / f"new-{name}", tmp_path / "copy" / name)
        assert process.stdout.readline().startswith("round 2/3")
        assert process.stdout.readline().startswith("round 3/3")
        shutil.copy(run / "summary.json", tmp_path / "copy" / "summary.json")
        assert "fedit, final round" in process.stdout.read()
    assert process.returncode == 0


def test_silence_is_told_once_and_an_interrupt_ends_quietly(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "copy", 2)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)
    assert "nothing since" in call("watch", tmp_path / "copy", "--once").output
    with watching(tmp_path / "copy") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert re.match(r"nothing new since .*, 1 h 00 min ago, and a round takes .*: has the run stopped\?", lines[3])
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    assert process.returncode == 130


def test_what_is_neither_a_run_nor_a_study_is_refused(tmp_path: Path) -> None:
    result = call("watch", tmp_path)
    assert result.exit_code == 2
    assert "neither a run (experiment.yaml) nor a study (study.json)" in " ".join(result.output.split())


@pytest.fixture
def a_study(run: Path, tmp_path: Path) -> Path:
    """Three cells: one is done, one goes on, one waits."""
    cells = [
        {"run": "runs/a", "method": "fedit", "setting": {"local.lr": 0.001}, "seed": 0},
        {"run": "runs/b", "method": "hetlora", "setting": {}, "seed": 0},
        {"run": "runs/c", "method": "hetlora", "setting": {}, "seed": 1},
    ]
    shutil.copytree(run, tmp_path / "runs" / "a")
    copied(run, tmp_path / "runs" / "b", 2)
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "cells": cells}))
    return tmp_path


def test_a_study_is_a_line_a_cell(a_study: Path) -> None:
    shown = call("watch", a_study, "--once").output.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["fedit", "hetlora", "hetlora"]
    assert "local.lr=0.001" in shown[1]
    assert "done, test" in shown[1]
    assert "round 2 of 3" in shown[2]
    assert "waiting" in shown[3]
    found = json.loads(call("watch", a_study, "--json").output)
    assert found["study"] == "s"
    assert [cell["state"] for cell in found["cells"]] == ["finished", "running", "waiting"]


def test_a_study_is_followed_until_all_are_done(a_study: Path, run: Path) -> None:
    with watching(a_study) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("fedit local.lr=0.001 seed 0: done")
        assert process.stdout.readline().startswith("hetlora seed 0: round 2 of 3")
        assert process.stdout.readline() == "hetlora seed 1: waiting\n"
        shutil.copy(run / "summary.json", a_study / "runs" / "b" / "summary.json")
        assert process.stdout.readline().startswith("hetlora seed 0: done")
        shutil.copytree(run, a_study / "runs" / "c")
        assert process.stdout.read().startswith("hetlora seed 1: ")
    assert process.returncode == 0


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, digits_config: Config) -> None:
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump({**copy.deepcopy(digits_config), "rounds": 500}))
    command = [*COMMAND, "run", str(file), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("round 1/500"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "continue with: polyrank resume" in process.stderr.read()
    assert process.returncode == 130
    assert Session(Run.open(tmp_path / "run")).state.round >= 1

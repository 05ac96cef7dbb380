"""Runs of a real deployment, by the command line: followed to their true end, submitted again, resumed, stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.deploy import control, follow, join, operate
from polyrank.deploy.layout import Deployment
from polyrank.experiment.store import Run

from .conftest import made

pytestmark = pytest.mark.deploy

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "digits.yaml"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)], catch_exceptions=False)


def orders(folder: Path, **told: Any) -> None:
    """What the toy server is to do in runs below a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "orders.json").write_text(json.dumps({"nodes": 2, **told}))


def soon(true: Callable[[], object], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_run_is_followed_to_its_end(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path)
    result = call("run", deployment.folder, EXPERIMENT, "--set", "rounds=2", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "2 of 3 nodes online" in result.stdout
    assert "round 1/2  clients 2/2  loss 1.0000" in result.stdout
    assert "round 2/2" in result.stdout
    assert "50.00%" in result.stdout
    (record, _) = Run.open(tmp_path / "a").records()
    sites = {str(deployment.node(name).folder / "site.yaml") for name in ("alpha", "beta")}
    assert set(record["losses"]) == sites  # each node read the configuration of its own site

    again = call("resume", deployment.folder, tmp_path / "a", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["method"] == "toy"
    states = json.loads(call("status", deployment.folder, "--json").stdout)
    (mine,) = (run for run in states["runs"] if run["folder"] == str(tmp_path / "a"))
    assert mine["status"] == "finished:completed"
    assert states["nodes"]["alpha"] == "online"
    assert "flwr-serverapp" in call("logs", deployment.folder, mine["id"]).stdout


def test_a_server_that_raises_is_an_error_that_says_why(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path, fail=[0])
    result = call("run", deployment.folder, EXPERIMENT, "--set", "rounds=2", "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "RuntimeError: the server stumbles in round 0" in result.stderr
    assert "finished:failed" in result.stderr
    assert f"polyrank deploy resume {deployment.folder} {tmp_path / 'a'}" in result.stderr.replace("\n", "")


def test_a_run_that_gets_on_is_submitted_again(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path, fail=[1])
    result = call("run", deployment.folder, EXPERIMENT, "--set", "rounds=2", "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "submitted again" in result.stdout
    assert result.stdout.count("round 1/2") == result.stdout.count("round 2/2") == 1
    folders = list(follow.submitted(deployment).values())
    assert folders.count(str(tmp_path / "a")) == 2


def test_completed_without_a_summary_is_not_done(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path, quiet=True)
    result = call("run", deployment.folder, EXPERIMENT, "--set", "rounds=1", "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "without a summary" in result.stderr


def test_an_interrupt_stops_following_and_not_the_run(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path, slow=3)
    command = [sys.executable, "-m", "polyrank.cli", "deploy", "run", str(deployment.folder), str(EXPERIMENT)]
    command += ["--set", "rounds=50", "--out", str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        soon((tmp_path / "a" / "rounds.jsonl").exists)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the run goes on" in said
    stored = Run.open(tmp_path / "a")
    assert follow.active(deployment, stored) is not None
    stopped = call("stop", deployment.folder, tmp_path / "a")
    assert stopped.exit_code == 0, stopped.output
    assert follow.active(deployment, stored) is None
    assert "no run is working on it" in call("stop", deployment.folder, tmp_path / "a").stderr


def test_a_server_survives_its_processes_and_ends_when_told(apps: None, tmp_path: Path) -> None:
    """A killed SuperLink costs no round that is done; `down` leaves no process; the next `up` knows the nodes."""
    found = made(tmp_path / "server", "only")
    node = found.node("only")
    orders(tmp_path, nodes=1, slow=1)
    try:
        ids = operate.up(found)
        join.join(node.folder, found.superlink, keep=False, check=False)
        assert join.connected(node, 60)
        stored = Run(tmp_path / "a")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "experiment.yaml").write_text("rounds: 6\nmethod: {name: toy}\n")
        run_id = follow.submit(found, stored)
        soon(stored.rounds_file.exists)
        killed = operate.processes(found)["superlink"]
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        outcome = follow.follow(found, run_id, stored, Nobody())
        if not outcome.completed:  # a call that was in flight may fail the run, which then goes on
            outcome = follow.drive(found, stored, Nobody())
        assert outcome.completed, outcome
        assert len(list(stored.records())) == 6
        pids = [pid for place in (found, node) for pid in operate.processes(place).values() if pid]
        trees = {each for pid in pids for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))}
    finally:
        ended = [operate.down(place) for place in (node, found)]
    assert ended == [
        ["supervisor", "superexec", "supernode"],
        ["supervisor", "registrar", "superexec", "superlink"],
    ]
    assert len(trees) >= 6
    assert not [each for each in trees if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert "does not answer" in call("run", found.folder, EXPERIMENT, "--out", tmp_path / "b").stderr
    assert not (tmp_path / "b").exists()
    try:
        assert operate.up(found) == ids
        operate.remove(found, "only")
        assert control.nodes(found) == {}
    finally:
        operate.down(found)


def test_a_second_run_says_that_it_waits_for_its_turn(deployment: Deployment, tmp_path: Path) -> None:
    orders(tmp_path, slow=1)
    stored = {name: Run(tmp_path / name) for name in "ab"}
    for name, rounds in (("a", 100), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text(f"rounds: {rounds}\nmethod: {{name: toy}}\n")
    first = follow.submit_in_turn(deployment, stored["a"], lambda text: None)
    assert follow.working(deployment) == first

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(follow.NotSubmittedError):
        follow.submit_in_turn(deployment, stored["b"], interrupt)
    assert follow.active(deployment, stored["b"]) is None
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        follow.stop(deployment, stored["a"])

    outcome = follow.drive(deployment, stored["b"], Nobody(), waits=stop)
    assert outcome.completed, outcome
    stops = f"`polyrank deploy stop {deployment.folder} {tmp_path / 'a'}` ends it"
    turn = "works on this federation, one run at a time: this one waits for its turn"
    assert said == [f"run {first} {turn}; {stops}"]


class Nobody:
    """Is told of rounds, and says nothing."""

    def add(self, record: Any, seconds: float) -> None:
        assert seconds == 1.0

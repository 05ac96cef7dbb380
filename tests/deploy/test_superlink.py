"""A real SuperLink with three nodes over TLS: every run ends with the simulator's bytes, whatever is killed."""

import copy
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from polyrank.deploy import follow, operate, registry, supervise
from polyrank.deploy.demo import CHECKED, set_up, tear_down
from polyrank.deploy.layout import Deployment
from polyrank.engines.audit import Audit
from polyrank.experiment.config import Experiment
from polyrank.experiment.loading import parse
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]
Config = dict[str, Any]
METHODS = ("fedit", "hetlora", "flexlora", "flora", "rb_lora", "hralora", "fed_hello")


class Silent:
    """Nobody is told of rounds."""

    def add(self, record: Any, seconds: float) -> None: ...


@pytest.fixture(scope="module")
def config(digits_config: Config) -> Config:
    config = copy.deepcopy(digits_config)
    config["data"] |= {"clients": 3, "importance": 12}
    config["fleet"] = [{"share": 1 / 3, "rank": rank} for rank in (1, 2, 4)]
    alone = {"together": "off", "cache": "off"}
    terms = {"clients": 3, "deadline": 300, "wait": 300}
    return {**config, "device": "cpu", "threads": 1, "rounds": 2, "simulation": alone, "deployment": terms}


def experiment(config: Config, **more: Any) -> Experiment:
    return on_this_machine(parse({**config, **more}, "test", Path()))


def simulated(folder: Path, chosen: Experiment) -> Run:
    session = Session(Run.create(folder, chosen))
    for _ in session.rounds():
        pass
    session.finish()
    return session.run


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment") / "d"
    # Under a name that is seen from here, as the command's own default is; processes of a node work elsewhere.
    made, _ = set_up(Path(os.path.relpath(folder)), experiment(config), gateway=False)
    try:
        yield made
    finally:
        tear_down(made)


def test_named_methods_end_with_the_simulator_s_bytes(deployment: Deployment, config: Config, tmp_path: Path) -> None:
    runs = {}
    for name in METHODS:  # at the same time: the SuperLink serves many runs
        runs[name] = Run.create(tmp_path / name, experiment(config, method={"name": name}))
        follow.submit(deployment, runs[name])
    for name, run in runs.items():
        outcome = follow.drive(deployment, run, Silent())
        assert outcome.completed, (name, outcome, outcome.errors)
        expected = simulated(tmp_path / f"{name}-simulated", run.experiment())
        for part in CHECKED:
            assert (run.folder / part).read_bytes() == (expected.folder / part).read_bytes(), (name, part)
        ranks = {client: tuple(sorted(own.items())) for client, own in next(run.records())["ranks"].items()}
        assert len(set(ranks.values())) == 3
        used = [line for line in Audit(run.folder / "audit.jsonl").lines() if line["event"] == "accepted"]
        assert len(used) == 2 * 3


def killed(folder: Path, name: str) -> bool:
    """SIGKILL for a process that a supervisor keeps; whether it ran."""
    pid = supervise.running(folder, name)
    if pid:
        os.kill(pid, signal.SIGKILL)
    return bool(pid)


def test_a_run_survives_what_is_killed(deployment: Deployment, config: Config, tmp_path: Path) -> None:
    terms = {**config["deployment"], "quorum": 0.6, "grace": 5, "deadline": 120}
    chosen = experiment(config, rounds=20, deployment=terms, method={"name": "rb_lora"})
    run = Run.create(tmp_path / "run", chosen)
    follow.submit(deployment, run)
    rng = np.random.default_rng(0)
    nodes = [deployment.node(name) for name in registry.names(deployment)]
    kills: list[str] = []
    plan = {3: "keeper", 5: "supernode", 8: "keeper", 11: "superlink", 14: "keeper", 16: "supernode"}
    ends = time.monotonic() + 1000
    while time.monotonic() < ends:
        done = sum(1 for _ in run.records())
        for round_ in [round_ for round_ in plan if round_ <= done]:
            what = plan.pop(round_)
            time.sleep(float(rng.uniform(0, 3)))
            place = deployment.run if what == "superlink" else nodes[rng.integers(len(nodes))].run
            if killed(place, what):
                kills.append(what)
        found = follow.active(deployment, run) if done == 20 or not plan else "running"
        if run.summary() is not None or found is None:
            break
        time.sleep(1)
    outcome = follow.drive(deployment, run, Silent())
    assert outcome.completed, (outcome, outcome.errors)
    assert sorted(kills) == sorted(["keeper"] * 3 + ["supernode"] * 2 + ["superlink"])
    records = list(run.records())
    assert [record["round"] for record in records] == list(range(20))
    losses = [np.mean(list(record["losses"].values())) for record in records]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    lines = list(Audit(run.folder / "audit.jsonl").lines())
    for record in records:
        used = {line["client"] for line in lines if line["event"] == "accepted" and line["round"] == record["round"]}
        assert used == set(record["bytes_up"])
        assert len(used) >= 2
    assert json.loads(run.summary_file.read_text())["rounds"] == 20
    assert set(operate.online(deployment).values()) <= {"online", "offline", "registered"}

"""What Flower adds to a round: a deployment on this machine, over TLS, against the simulator; and a large adapter.

    python bench/deploy.py               # about three minutes; all processes and both cores are this machine's

Two deployments with node keys. The digits of experiments/deploy.yaml with three clients: seconds of a round, deployed
and simulated. Then two clients that exchange an adapter of 60 MB each way and train one step: seconds of a whole round,
aggregation, evaluation and checkpoint included. The first round of each is left out: models are loaded in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from machine import machine
from polyrank.deploy import follow
from polyrank.deploy.demo import set_up, tear_down
from polyrank.experiment.config import Experiment
from polyrank.experiment.loading import load
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.local.hf import random_vit, save_model, small_vit_config
from records import RESULTS, store
from verdicts import lines, verdict

FILE = Path(__file__).parents[1] / "experiments" / "deploy.yaml"
GOAL = 15.0  # seconds of a round with 60 MB each way


class Silent:
    """Nobody is told of rounds."""

    def add(self, record: Any, seconds: float) -> None: ...


def deployed(folder: Path, experiment: Experiment) -> list[float]:
    """Seconds of the rounds of a deployed run, without the first."""
    deployment, run = set_up(folder, experiment, gateway=False)
    try:
        outcome = follow.drive(deployment, run, Silent())
    finally:
        tear_down(deployment)
    assert outcome.completed, outcome
    return seconds_of(run)


def simulated(folder: Path, experiment: Experiment) -> list[float]:
    """Seconds of the rounds of the same run in this process, without the first."""
    session = Session(Run.create(folder, experiment))
    for _ in session.rounds():
        pass
    return seconds_of(session.run)


def seconds_of(run: Run) -> list[float]:
    return [json.loads(line)["wall_seconds"] for line in run.timings_file.read_text().splitlines()][1:]


def large(folder: Path) -> Experiment:
    """Two clients of rank 100 on every linear layer of eight blocks, 1,024 wide: 59 MB of factors each."""
    config = small_vit_config(8, 4, 1024, 8, 16, 1, 10)
    save_model(random_vit(config, np.random.default_rng(0)), folder)
    overrides = [
        *(f"model={{name: {folder}, targets: attention+mlp, rank: 100}}", "method=fedit", "rounds=4"),
        *("data.clients=2", "data.limit={train: 32, validation: 20, test: 20}", "deployment.clients=2"),
        *("fleet=[{rank: 100}]", "local.steps=1", "local.batch=4", "evaluate.aggregation=false"),
    ]
    return on_this_machine(load(FILE, overrides))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        digits = on_this_machine(load(FILE, [f"rounds={options.rounds}"]))
        here, there = simulated(place / "simulated", digits), deployed(place / "digits", digits)
        wide = deployed(place / "large", large(place / "model"))
    verdicts = [
        verdict("digits, 3 clients: seconds of a round, simulated", median(here), "at most", None),
        verdict("digits, 3 clients: seconds of a round, deployed", median(there), "at most", None),
        verdict("60 MB each way, 2 clients: seconds of a round", median(wide), "at most", GOAL),
    ]
    record = {"machine": machine(), "seconds": {"simulated": here, "deployed": there, "large": wide}}
    store(RESULTS / "deploy.json", {**record, "verdicts": verdicts})
    print("\n".join(lines(verdicts)))
    return 0 if all(v["met"] is not False for v in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

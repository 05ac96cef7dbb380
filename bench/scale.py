"""Registered clients: what a run of 100 clients a round pays for all those it does not ask.

    python bench/scale.py             # writes bench/results/scale.json
    python bench/scale.py --quick     # 100 and 100,000 clients, once, written nowhere
    python bench/scale.py --check     # and fails where a goal is missed

Every number of registered clients runs in a process of its own, in turns; figures are medians over the turns.

    start-up    the split, profiles, budgets and the simulator, as `polyrank run` makes them; the data's and the model's
                loading, which do not depend on the clients, are apart
    overhead    a round of clients that echo what they were sent: cohort, tasks, aggregate, record and checkpoint
    training    a round of clients that take one step on one example
    memory      the highest resident memory of the process

The data is the same for all: 200,000 random images of the digits' size, dealt out by Dirichlet(0.5).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from machine import machine
from records import store
from verdicts import Verdict, shown, verdict

RESULTS = Path(__file__).parent / "results" / "scale.json"
REGISTERED, COHORT, EXAMPLES = [100, 1_000, 10_000, 100_000], 100, 200_000
ROUNDS = {"overhead": 9, "training": 5}
STARTUP, OVERHEAD, MEMORY = 5.0, 1.2, 200.0  # seconds; of the round with 100 clients; MB more than with 100 clients

Figures = dict[str, Any]


def experiment_of(folder: Path, clients: int) -> dict[str, Any]:
    """The experiment as its file would have it."""
    return {
        "rounds": 100,
        "cohort": COHORT,
        "device": "cpu",
        "threads": 1,
        "model": {"name": "digits-vit", "targets": ["query", "value"], "rank": 8},
        "data": {
            "name": "files",
            "train": str(folder / "train.npz"),
            "validation": str(folder / "test.npz"),
            "test": str(folder / "test.npz"),
            "image": "image",
            "clients": clients,
            "partition": {"name": "dirichlet", "alpha": 0.5},
        },
        "fleet": [
            {"name": "small", "share": 0.5, "memory": "1 GiB", "uplink": "1 Mbit/s"},
            {"name": "large", "share": 0.5, "memory": "2 GiB", "uplink": "4 Mbit/s"},
        ],
        "method": {"name": "rb_lora", "estimate": "least"},
        "local": {"steps": 1, "batch": 1},
    }


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", EXAMPLES), ("test", 100)):
        images = rng.integers(0, 256, (count, 8, 8), np.uint8)
        np.savez(folder / f"{name}.npz", image=images, label=np.arange(count) % 10)


def measured(folder: Path, clients: int) -> Figures:
    """All figures for one number of clients, in this process."""
    from polyrank.core.fake import FakeClients, echo
    from polyrank.core.federate import federate
    from polyrank.core.roster import ascending
    from polyrank.engines.simulator import Simulator
    from polyrank.experiment.build import build
    from polyrank.experiment.loading import parse
    from polyrank.experiment.shares import fleet_profiles, share_data
    from polyrank.experiment.store import Run

    experiment = parse(experiment_of(folder, clients), "scale", folder)
    world = build(parse(experiment_of(folder, COHORT), "scale", folder))  # the model and the data, loaded
    local, spec = experiment.local_training(), world.spec

    begin = time.perf_counter()
    shares = share_data(experiment)
    dealt = time.perf_counter()
    profiles = fleet_profiles(experiment.fleet, shares)
    simulator = Simulator(world.base, world.splits["train"], shares.indices(), profiles, spec=spec)
    world.method.estimate(profiles, spec, local)
    ascending(profiles)
    ready = time.perf_counter()

    run = Run(folder / f"run-{clients}-{os.getpid()}")
    run.folder.mkdir()
    seconds: dict[str, list[float]] = {}
    for kind, asked in {"overhead": FakeClients(profiles, echo), "training": simulator}.items():
        seconds[kind] = []
        rounds = federate(world.method, world.start, asked, spec, local, rounds=ROUNDS[kind] + 1, cohort=COHORT)
        last = time.process_time()
        for state, record in rounds:
            run.append(record, 0.0)
            run.save(state)
            seconds[kind].append(time.process_time() - last)
            last = time.process_time()
    return {
        "startup": ready - begin,
        "split": dealt - begin,
        "clients": ready - dealt,
        **{kind: median(values[1:]) for kind, values in seconds.items()},  # the first round warms up, and estimates
        "memory": peak_mb(),
        "checkpoint": run.checkpoint.stat().st_size,
    }


def peak_mb() -> float:
    """The highest resident memory of this process so far, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def in_a_process(folder: Path, clients: int) -> Figures:
    command = [sys.executable, __file__, "--measure", str(clients), "--folder", str(folder)]
    # Without a cache the images would be prepared anew in every process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLYRANK_CACHE": str(folder / "cache")}
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: Figures = json.loads(shown.stdout.splitlines()[-1])
    return found


def verdicts(found: dict[int, Figures]) -> Iterator[Verdict]:
    """Figures beside goals, which are for the most clients."""
    least, most = found[min(found)], max(found)
    for clients, x in found.items():
        goal = (STARTUP, OVERHEAD, MEMORY) if clients == most else (None, None, None)
        yield verdict(f"{clients:,} clients: start-up, seconds", x["startup"], "at most", goal[0])
        if x is not least:
            yield verdict(
                f"{clients:,} clients: overhead of a round", x["overhead"] / least["overhead"], "at most", goal[1]
            )
            yield verdict(f"{clients:,} clients: a round of training", x["training"] / least["training"])
            yield verdict(f"{clients:,} clients: more memory, MB", x["memory"] - least["memory"], "at most", goal[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--quick", action="store_true", help="the ends alone, once, written nowhere")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measured(options.folder, options.measure)))
        return 0
    registered = [REGISTERED[0], REGISTERED[-1]] if options.quick else REGISTERED
    runs: dict[int, list[Figures]] = {clients: [] for clients in registered}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        in_a_process(folder, registered[0])  # fills the cache
        for _ in range(1 if options.quick else options.repeats):
            for clients, own in runs.items():
                own.append(in_a_process(folder, clients))
    found = {clients: {key: median(x[key] for x in own) for key in own[0]} for clients, own in runs.items()}
    said = list(verdicts(found))
    met = shown(said)
    if not options.quick:
        goals = {"startup": STARTUP, "overhead": OVERHEAD, "memory": MEMORY}
        result = {
            "machine": machine(threads=1),
            "goals": goals,
            "cohort": COHORT,
            "medians": found,
            "turns": runs,
            "verdicts": said,
        }
        store(options.out, result)
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())

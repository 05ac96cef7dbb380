"""A run that is killed at any moment, again and again, ends with the bytes of one that was not."""

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyrank.core.rng import stream
from polyrank.experiment.store import Run
from polyrank.experiment.study import listing
from sittings import contents

Config = dict[str, Any]
Polyrank = Callable[..., int]
KILLS, KILLED = 20, -signal.SIGKILL


@pytest.fixture(scope="module")
def polyrank() -> Iterator[Polyrank]:
    """(arguments, when it is killed) -> the exit status of a process of its own."""
    script = Path(__file__).with_name("killing.py")
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def run(*arguments: str, **plan: Any) -> int:
            print(json.dumps({"arguments": arguments, **plan}), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        yield run
        parent.stdin.close()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> Path:
    """Rounds of a method that remembers who has pruned what, so that all that a checkpoint holds is there."""
    config = copy.deepcopy(digits_config)
    config["data"] |= {"clients": 3, "limit": {"train": 48, "validation": 20, "test": 20}}
    config |= {"rounds": 8, "threads": 1, "device": "cpu", "cohort": 2}
    config["simulation"] = {"together": "off", "cache": "off"}  # not what is free just now
    config["method"] = {"name": "hetlora", "decay": 0.5, "penalty": 0.1}
    path = tmp_path_factory.mktemp("killed") / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def moment(number: int, start: float, whole: float) -> dict[str, Any]:
    """When the next process is killed, by the seconds that starting and a whole run take."""
    rng = stream(0, "kills", number)
    way = number % 5
    if way == 0:
        return {"after": float(rng.uniform(0, start))}
    if way == 1:
        return {"after": float(start + rng.uniform(0, (whole - start) / 4))}
    if way == 2:  # most of the time, in the middle of a write
        return {"after": float(start + rng.uniform(0, (whole - start) / 2)), "slow": 0.05}
    at = ("write", "replace", "replaced")[int(rng.integers(3))] if way == 3 else "write"
    return {"at": at, "count": int(rng.integers(1, 25)), "share": float(rng.choice([0, rng.random(), 1]))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, polyrank: Polyrank, experiment: Path) -> tuple[Path, float]:
    """A run that nobody kills, and the seconds it takes once caches are warm."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("first", "second"):
        begun = time.monotonic()
        assert polyrank("run", str(experiment), "--out", str(folder / name)) == 0
    assert contents(folder / "first") == contents(folder / "second")
    return folder / "second", time.monotonic() - begun


def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bytes(
    tmp_path: Path, polyrank: Polyrank, experiment: Path, whole: tuple[Path, float]
) -> None:
    unharmed, seconds = whole
    start = seconds - Run.open(unharmed).wall_seconds()
    kills, runs, tried, stopped = 0, 0, 0, set()
    folder = tmp_path / "killed"
    while kills < KILLS or folder.exists():
        there = (folder / "experiment.yaml").is_file()
        arguments = ("resume", str(folder)) if there else ("run", str(experiment), "--out", str(folder))
        plan = moment(tried, start, seconds) if kills < KILLS else {}
        tried += 1  # what comes too late to kill is not tried again
        status = polyrank(*arguments, **plan)
        if status == KILLED:
            kills += 1
            stopped.add(len(list(Run(folder).records())))
            continue
        assert status == 0, (arguments, plan)
        assert contents(folder) == contents(unharmed)
        runs += 1
        folder = tmp_path / f"killed-{runs}"
    assert kills == KILLS
    assert len(stopped) > 4, stopped  # at the beginning, in the middle and at the end of runs


def test_a_process_that_is_killed_while_it_starts_leaves_nothing_in_the_way(
    tmp_path: Path, polyrank: Polyrank, experiment: Path, whole: tuple[Path, float]
) -> None:
    """In the middle of its imports, and of writing the first of its files."""
    command = ("run", str(experiment), "--out", str(tmp_path / "run"))
    for seconds in stream(0, "starts").uniform(0.01, 0.6, 3):
        process = subprocess.Popen([sys.executable, "-m", "polyrank.cli", *command])
        time.sleep(seconds)
        process.kill()
        assert process.wait() == KILLED
    for plan in ({"at": "write", "share": 0.5}, {"at": "replace", "share": 1}):
        assert polyrank(*command, count=1, **plan) == KILLED
        assert [path.suffix for path in (tmp_path / "run").iterdir()].count(".tmp") > 0
    assert polyrank(*command) == 0
    assert contents(tmp_path / "run") == contents(whole[0])


def test_a_study_that_is_killed_five_times_ends_with_the_same_bytes(
    tmp_path: Path, polyrank: Polyrank, experiment: Path
) -> None:
    config = yaml.safe_load(experiment.read_text())
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**config, "study": {"methods": ["hetlora", "local"], "seeds": [0, 1]}}))
    command = ("compare", str(file), "--quiet", "--out")
    assert polyrank(*command, str(tmp_path / "whole")) == 0
    rng, stopped = stream(0, "study"), set()
    for _ in range(5):
        at, count, share = ("write", "replace", "replaced")[rng.integers(3)], int(rng.integers(2, 25)), rng.random()
        assert polyrank(*command, str(tmp_path / "killed"), at=at, count=count, share=float(share)) == KILLED
        runs = (tmp_path / "killed").glob("runs/*/*")
        stopped.add(sum(len(list(Run(run).records())) for run in runs))
    assert len(stopped) > 2, stopped
    assert polyrank(*command, str(tmp_path / "killed")) == 0
    whole, killed = (
        {entry["run"]: contents(tmp_path / name / entry["run"]) for entry in listing(tmp_path / name)}
        for name in ("whole", "killed")
    )
    assert whole == killed
    assert len(whole) == 4

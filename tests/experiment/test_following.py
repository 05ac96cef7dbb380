"""A run's folder, read while somebody else writes it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyrank.errors import InputError
from polyrank.experiment.following import Following, described, study

PLAN = "rounds: 4\nmethod: {name: fedit}\n"
SUMMARY = {"final": {"test": {"accuracy": 0.5}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment.yaml").write_text(PLAN)
    return tmp_path


def record(number: int) -> dict[str, Any]:
    return {"round": number, "metrics": {"validation/accuracy": number / 10}}


def write(folder: Path, rounds: int, timed: int | None = None, tail: str = "") -> None:
    """As a copy leaves it: new files in place of the old ones, of which one may be behind."""
    timed = rounds if timed is None else timed
    lines = {
        "rounds.jsonl": [record(number) for number in range(rounds)],
        "timings.jsonl": [{"round": number, "wall_seconds": 2.0} for number in range(timed)],
    }
    for name, values in lines.items():
        (folder / "new").write_text("".join(json.dumps(value) + "\n" for value in values) + tail)
        os.replace(folder / "new", folder / name)


def told(run: Following) -> list[tuple[int, float | None]]:
    return [(found["round"], seconds) for found, seconds in run.ended()]


def test_every_round_is_told_of_once(folder: Path) -> None:
    run = Following(folder)
    assert told(run) == []
    write(folder, 2)
    assert told(run) == [(0, 2.0), (1, 2.0)]
    assert told(run) == []
    write(folder, 3)
    assert told(run) == [(2, 2.0)]
    assert (run.done, run.last) == (3, record(2))
    assert told(Following(folder, 2)) == [(2, 2.0)]


def test_a_line_that_is_half_there_is_not_there_yet(folder: Path) -> None:
    run = Following(folder)
    write(folder, 1, tail='{"round": 1, "met')
    assert told(run) == [(0, 2.0)]
    write(folder, 2)
    assert told(run) == [(1, 2.0)]
    with open(folder / "rounds.jsonl", "a") as rounds, open(folder / "timings.jsonl", "a") as timings:
        line = json.dumps(record(2)) + "\n"
        timings.write('{"round": 2, "wall_seconds": 3.0}\n')
        timings.flush()
        for part in (line[:9], line[9:20]):
            rounds.write(part)
            rounds.flush()
            assert told(run) == []
        rounds.write(line[20:])
        rounds.flush()
        assert told(run) == [(2, 3.0)]


def test_seconds_that_are_behind_are_waited_for(folder: Path) -> None:
    run = Following(folder)
    write(folder, 2, timed=1)
    assert told(run) == [(0, 2.0)]
    assert told(run) == []
    write(folder, 2)
    assert told(run) == [(1, 2.0)]
    write(folder, 4, timed=2)  # but not where there is more
    assert told(run) == [(2, None)]
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert told(run) == [(3, None)]


def test_a_copy_without_seconds_is_followed_all_the_same(folder: Path) -> None:
    write(folder, 2)
    (folder / "timings.jsonl").unlink()
    assert told(Following(folder)) == [(0, None), (1, None)]


def test_a_resumed_run_that_runs_a_round_again_is_told_of_it_once(folder: Path) -> None:
    run = Following(folder)
    write(folder, 3)
    assert len(told(run)) == 3
    write(folder, 2)  # the third had no checkpoint
    assert told(run) == []
    write(folder, 4)
    assert told(run) == [(3, 2.0)]


def test_states(folder: Path) -> None:
    run = Following(folder)
    assert Following(folder / "elsewhere").state() == "waiting"
    began = run.heard()
    assert (run.state(began + 1), run.state(began + 1000)) == ("running", "silent")
    write(folder, 2)
    run.read()
    heard = run.heard()
    assert run.state(heard + 59) == "running"  # rounds take 2 s
    assert run.state(heard + 61) == "silent"
    assert run.left(heard + 1) == pytest.approx(3.0)
    run.seconds = {0: 100.0, 1: 100.0}
    assert run.state(heard + 900) == "running"
    assert run.state(heard + 1001) == "silent"
    (folder / "summary.json").write_text('{"final"')
    assert run.state(heard) == "running"
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    assert run.state(heard + 10**6) == "finished"


def test_a_run_in_words_for_programs(folder: Path) -> None:
    write(folder, 2)
    run = Following(folder)
    run.read()
    found = described(run, {"run": "x", "method": "mine", "setting": {"local.lr": 0.1}, "seed": 3})
    assert found["left_seconds"] == pytest.approx(4.0, abs=1)
    assert {key: found[key] for key in ("method", "setting", "seed", "state", "round", "rounds", "metrics")} == {
        "method": "mine",
        "setting": {"local.lr": 0.1},
        "seed": 3,
        "state": "running",
        "round": 2,
        "rounds": 4,
        "metrics": {"validation/accuracy": 0.1},
    }


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (PLAN, ("fedit", 4)),
        ("rounds: 4\nmethod: hralora\nregime: federated\n", ("hralora", 4)),
        ("rounds: 4\nmethod: {name: fedit}\nregime: local\n", ("local", 4)),
        ("rounds: 4\nmethod: {name: fedit}\nregime: zero_shot\n", ("zero_shot", 0)),
    ],
)
def test_what_runs(folder: Path, plan: str, expected: tuple[str, int]) -> None:
    (folder / "experiment.yaml").write_text(plan)
    run = Following(folder)
    assert (run.method(), run.rounds()) == expected


def test_a_file_that_is_no_experiment_is_said_to_be_none(folder: Path) -> None:
    (folder / "experiment.yaml").write_text("nothing")
    with pytest.raises(InputError, match=r"experiment\.yaml: not a resolved experiment"):
        Following(folder).rounds()


def test_a_study(folder: Path) -> None:
    assert study(folder) is None
    (folder / "study.json").write_text('{"cells": 3}')
    with pytest.raises(InputError, match=r"study\.json: not a study"):
        study(folder)
    (folder / "study.json").write_text('{"name": "s", "cells": []}')
    assert study(folder) == {"name": "s", "cells": []}


def test_watching_loads_no_torch() -> None:
    modules = "polyrank.cli.watching, polyrank.experiment.following, polyrank.report.progress, polyrank.report.watching"
    script = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)

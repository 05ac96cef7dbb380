"""Studies: what is planned, run, found again and refused."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from polyrank.experiment.conduct import run_study
from polyrank.experiment.config import ConfigError, Contender, StudyConfig
from polyrank.experiment.store import Run
from polyrank.experiment.study import Study, StudyError, cost, listing, planned
from sittings import contents

Config = dict[str, Any]


@pytest.fixture
def config(digits_config: Config) -> Config:
    config = copy.deepcopy(digits_config)
    config["data"] |= {"clients": 3, "limit": {"train": 48, "validation": 20, "test": 20}}
    return {**config, "rounds": 2, "threads": 1, "simulation": {"together": "off", "cache": "off"}}


def study_of(config: Config, folder: Path, *methods: str | Contender, **asked: Any) -> Study:
    return planned(config, "tiny.yaml", folder.parent, StudyConfig(methods=list(methods), **asked), folder)


def run_all(study: Study, jobs: int = 1) -> dict[str, Any]:
    return {cell.folder.as_posix(): found for cell, found in run_study(study, jobs)}


def all_contents(study: Study) -> dict[str, dict[str, bytes]]:
    return {cell.folder.as_posix(): contents(study.run_of(cell).folder) for cell in study.cells}


def test_every_method_meets_the_same_clients_with_the_same_data(tmp_path: Path, config: Config) -> None:
    """Also where one of them has the server keep examples to measure importance on."""
    config["data"]["limit"]["train"] = 148
    study = study_of(config, tmp_path / "s", "fedit", "fim_hla", "single", "local", "zero_shot", seeds=[0, 1])
    assert all(isinstance(found, dict) for found in run_all(study).values())
    for seed in (0, 1):
        cells = [cell for cell in study.cells if cell.seed == seed]
        assert [cell.method for cell in cells] == ["fedit", "fim_hla", "single", "local", "zero_shot"]
        assert {cell.experiment.data.importance for cell in cells} == {100}
        facts = [json.loads(study.run_of(cell).setting_file.read_text()) for cell in cells]
        assert all(each["members"] == facts[0]["members"] for each in facts)
        before = [study.run_of(cell).summary()["before"] for cell in cells]
        assert all(each == before[0] for each in before)


def test_a_study_is_a_folder_that_says_what_is_in_it(tmp_path: Path, config: Config) -> None:
    grid = {"local.lr": [0.001, 0.01], "local.batch": [8]}
    study = study_of(config, tmp_path / "s", "fedit", seeds=[3], grid=grid)
    run_all(study)
    assert listing(tmp_path / "s") == [
        {
            "run": f"runs/fedit, local.lr={lr}, local.batch=8/seed-3",
            "method": "fedit",
            "setting": {"local.lr": lr, "local.batch": 8},
            "seed": 3,
        }
        for lr in (0.001, 0.01)
    ]
    for entry in listing(tmp_path / "s"):
        experiment = Run.open(tmp_path / "s" / entry["run"]).experiment()
        assert (experiment.local.lr, experiment.local.batch, experiment.seed) == (entry["setting"]["local.lr"], 8, 3)


def test_what_is_done_is_not_repeated_and_more_can_be_added(tmp_path: Path, config: Config) -> None:
    first = study_of(config, tmp_path / "s", "fedit")
    run_all(first)
    written = Run(tmp_path / "s" / "runs/fedit/seed-0").summary_file.stat().st_mtime_ns
    more = study_of(config, tmp_path / "s", "fedit", "flexlora", seeds=[0, 1])
    assert sorted(run_all(more)) == ["runs/fedit/seed-1", "runs/flexlora/seed-0", "runs/flexlora/seed-1"]
    assert Run(tmp_path / "s" / "runs/fedit/seed-0").summary_file.stat().st_mtime_ns == written
    assert len(listing(tmp_path / "s")) == 4
    run_all(study_of(config, tmp_path / "s", "flexlora"))
    assert len(listing(tmp_path / "s")) == 4


def test_labels_set_what_they_stand_for(tmp_path: Path, config: Config) -> None:
    config["study"] = {
        "methods": ["fedit", {"label": "aligned", "set": {"method": "rb_lora", "method.aggregate.align": True}}],
        "seeds": [5],
    }
    study = study_of(config, tmp_path / "s")
    assert [(cell.method, cell.seed) for cell in study.cells] == [("fedit", 5), ("aligned", 5)]
    assert study.cells[1].experiment.resolved()["method"]["aggregate"]["align"] is True
    assert "study" not in study.cells[0].experiment.resolved()


def test_the_files_own_method_keeps_its_options_and_its_baselines_are_runs(tmp_path: Path, config: Config) -> None:
    config |= {"method": {"name": "rb_lora", "aggregate": {"align": True}}, "baselines": ["local"]}
    study = study_of(config, tmp_path / "s", "fedit", "rb_lora")
    assert [cell.method for cell in study.cells] == ["fedit", "rb_lora", "local"]
    assert study.cells[1].experiment.resolved()["method"]["aggregate"]["align"] is True
    assert not any(cell.experiment.baselines for cell in study.cells)


def test_several_processes_make_the_same_bytes(tmp_path: Path, config: Config) -> None:
    one, two = (study_of(config, tmp_path / name, "fedit", "local", seeds=[0, 1]) for name in ("one", "two"))
    run_all(one)
    assert all(isinstance(found, dict) for found in run_all(two, jobs=2).values())
    assert all_contents(one) == all_contents(two)


def test_a_study_keeps_its_threads(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs on four threads are begun with two each; whoever goes on with one job has two as well."""
    del config["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    study = planned(config, "tiny.yaml", tmp_path, StudyConfig(), tmp_path / "s", jobs=2)
    assert study.cells[0].experiment.threads == 2
    study.write()
    Run.create(study.run_of(study.cells[0]).folder, study.cells[0].experiment)
    assert study_of(config, tmp_path / "s", "fedit", "flora").cells[1].experiment.threads == 2


def test_one_run_that_fails_does_not_stop_the_others(tmp_path: Path, config: Config) -> None:
    wild = Contender(label="wild", set={"local.lr": 1e30, "local.optimizer": "sgd", "local.clip": None})
    found = run_all(study_of(config, tmp_path / "s", wild, "fedit"))
    assert "loss" in found["runs/wild/seed-0"]
    assert found["runs/fedit/seed-0"]["rounds"] == 2
    assert [cell.method for cell in study_of(config, tmp_path / "s", wild, "fedit").due()] == ["wild"]


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({}, {"methods": ["hralorra"]}, ["methods: 'hralorra' is unknown", "Did you mean 'hralora'?", "zero_shot"]),
        ({}, {"grid": {"local.lr": [0.1, "fast"]}}, ["tiny.yaml (fedit, local.lr=fast)", "local.lr: 'fast'"]),
        ({}, {"grid": {"local.speed": [1]}}, ["unknown key 'speed'"]),
        ({}, {"methods": [Contender(label="a", set={"rounds": 1}), Contender(label="a")]}, ["have the label 'a'"]),
        ({"model": {"name": "digits-vit", "rank": 1}}, {}, ["fleet.0.rank: 2 exceeds model.rank, 1"]),
        ({"study": {"seeds": [-1]}}, {}, ["tiny.yaml: study: seeds.0: -1"]),
    ],
)
def test_a_mistake_in_any_run_is_found_before_the_first(
    tmp_path: Path, config: Config, change: Config, asked: Config, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned({**config, **change}, "tiny.yaml", tmp_path, StudyConfig(**asked), tmp_path / "s")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "s").exists()


def test_another_study_in_the_folder_is_left_alone(tmp_path: Path, config: Config) -> None:
    run_all(study_of(config, tmp_path / "s", "fedit"))
    with pytest.raises(StudyError, match=r"seed-0: was made with rounds: 2, and this study has 3; choose another"):
        study_of({**config, "rounds": 3}, tmp_path / "s", "fedit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StudyError, match=r"mine: is neither an empty folder nor a study"):
        study_of(config, tmp_path / "mine", "fedit")


def test_two_processes_do_not_run_one_study(tmp_path: Path, config: Config) -> None:
    running = run_study(study_of(config, tmp_path / "s", "fedit", "flora"))
    next(running)
    with pytest.raises(StudyError, match="another process is running this study"):
        next(run_study(study_of(config, tmp_path / "s", "fedit", "flora")))
    running.close()
    assert len(run_all(study_of(config, tmp_path / "s", "fedit", "flora"))) == 1


def test_what_is_foreseen_is_what_is_sent(tmp_path: Path, config: Config) -> None:
    for method in ("fedit", "rolora", "single"):
        study = study_of({**config, "rounds": 3}, tmp_path / method, method)
        (summary,) = run_all(study).values()
        foreseen = cost(study.cells[0].experiment)
        assert (foreseen["bytes_up"], foreseen["bytes_down"]) == (summary["bytes_up"], summary["bytes_down"])


def test_processes_of_a_study_end_with_it(tmp_path: Path, config: Config) -> None:
    """A killed study leaves nobody at work in its folder."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**config, "rounds": 500}))
    command = [sys.executable, "-m", "polyrank.cli", "compare", str(file), "--seeds", "0,1", "--jobs", "2"]
    with subprocess.Popen([*command, "--out", str(tmp_path / "s")]) as process:
        ends = time.monotonic() + 120
        while len(list((tmp_path / "s").rglob("rounds.jsonl"))) < 2:
            assert time.monotonic() < ends
            assert process.poll() is None
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) >= 2
    assert alive == []

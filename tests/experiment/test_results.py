"""Runs from Python: what they write is the command's, and what they have recorded comes back as frames."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import polyrank
from polyrank.cli import app
from polyrank.errors import InputError
from polyrank.experiment.store import Run, RunError
from sittings import Config, contents, finished, started

pd = pytest.importorskip("pandas", reason="the extra `report` is not installed")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, digits_file: Path) -> tuple[Path, Any]:
    """A run made from Python, with what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = {"method": "hralora", "local.lr": 1e-5, "cohort": 3, "absent": 0.3, "data.importance": 20}
    changes |= {"baselines": ["single"]}
    return folder, polyrank.run(digits_file, changes, out=folder)


def records(folder: Path) -> list[dict[str, Any]]:
    return list(Run.open(folder).records())


def test_a_run_from_python_is_the_command_s(tmp_path: Path, digits_file: Path) -> None:
    seen: list[tuple[int, bool]] = []
    found = polyrank.run(
        digits_file,
        ["rounds=2", "method=flora"],
        out=tmp_path / "python",
        watch=lambda record, seconds: seen.append((record.round, seconds > 0)),
    )
    command = ["run", str(digits_file), "--set", "rounds=2", "--set", "method=flora", "--out", str(tmp_path / "cli")]
    assert CliRunner().invoke(app, [*command, "--quiet"]).exit_code == 0
    assert contents(tmp_path / "python") == contents(tmp_path / "cli")
    assert seen == [(0, True), (1, True)]
    assert found.summary.final_accuracy[0] == Run.open(tmp_path / "cli").summary()["final"]["test"]["accuracy"]


def test_overrides_may_be_a_mapping(done: tuple[Path, Any]) -> None:
    experiment = Run.open(done[0]).experiment()
    assert experiment.method.name == "hralora"
    assert experiment.local.lr == 1e-5
    assert experiment.cohort == 3


def test_the_summary_is_a_row_per_run(done: tuple[Path, Any]) -> None:
    folder, found = done
    summary, (row,) = Run.open(folder).summary(), found.summary.to_dict("records")
    assert list(found.summary)[:3] == ["run", "method", "seed"]
    assert row["run"] == str(folder)
    assert (row["method"], row["seed"], row["rounds"]) == ("hralora", 0, 3)
    for part in ("before", "final", "selected"):
        for metric, value in summary[part]["test"].items():
            assert row[f"{part}_{metric}"] == value
    assert row["selected_round"] == summary["selected"]["round"]
    assert row["single_accuracy"] == summary["baselines"]["single"]["test"]["accuracy"]
    assert (row["bytes_up"], row["bytes_down"]) == (summary["bytes_up"], summary["bytes_down"])
    assert row["seconds"] == pytest.approx(sum(record["seconds"] for record in records(folder)))
    assert row["wall_seconds"] == pytest.approx(summary["wall_seconds"], abs=0.01)


def test_rounds_are_a_row_per_round(done: tuple[Path, Any]) -> None:
    folder, found = done
    assert found.rounds is found.rounds
    assert found.rounds["round"].tolist() == [0, 1, 2]
    for row, record in zip(found.rounds.to_dict("records"), records(folder), strict=True):
        assert row["validation_accuracy"] == record["metrics"]["validation/accuracy"]
        assert row["loss"] == pytest.approx(sum(record["losses"].values()) / len(record["losses"]))
        assert (row["asked"], row["answered"]) == (len(record["bytes_down"]), len(record["bytes_up"]))
        assert row["bytes_up"] == sum(record["bytes_up"].values())
        assert row["factors"] == record["factors"]
    assert found.rounds.dropped.sum() > 0


def test_clients_and_layers_are_rows_of_those_that_were_asked(done: tuple[Path, Any]) -> None:
    folder, found = done
    asked = [(r["round"], client) for r in records(folder) for client in r["ranks"]]
    assert list(zip(found.clients["round"], found.clients["client"], strict=True)) == asked
    assert (~found.clients.answered).sum() == found.rounds.dropped.sum()
    assert found.clients.loss.isna().tolist() == (~found.clients.answered).tolist()
    total = found.layers.groupby(["round", "client"], sort=False)["rank"].sum()
    assert total.tolist() == found.clients["rank"].tolist()
    first = records(folder)[0]["ranks"]
    for client, ranks in first.items():
        rows = found.layers[(found.layers["round"] == 0) & (found.layers.client == client)]
        assert dict(zip(rows.layer, rows["rank"], strict=True)) == ranks


def test_scores_stay_until_they_are_measured_again(tmp_path: Path, digits_config: Config) -> None:
    finished(started(tmp_path / "run", digits_config))
    path = tmp_path / "run" / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    layer = next(iter(lines[0]["ranks"]["client_0"]))
    for line, scores in zip(lines, ({}, {layer: 2.0}, {}), strict=True):
        line["scores"] = scores
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = polyrank.load(tmp_path / "run").layers
    of_layer = found[(found.layer == layer) & (found.client == "client_0")]
    assert of_layer.score.fillna(-1).tolist() == [-1, 2, 2]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, digits_config: Config) -> Path:
    """Three cells of a study: one is finished, one has run for a round, one has not begun."""
    folder = tmp_path_factory.mktemp("studies") / "study"
    rates = (1e-3, 5e-3, 1e-2)
    cells = [
        {"run": f"runs/fedit/{rate}", "method": "fedit", "setting": {"local.lr": rate}, "seed": 0} for rate in rates
    ]
    finished(started(folder / cells[0]["run"], digits_config, rounds=2))
    next(started(folder / cells[1]["run"], digits_config, rounds=2).rounds())
    (folder / "study.json").write_text(json.dumps({"name": "digits", "cells": cells}))
    return folder


def test_a_study_s_frames_have_a_column_for_what_it_varies(study: Path) -> None:
    found = polyrank.load(study)
    assert list(found.summary)[:4] == ["run", "method", "local.lr", "seed"]
    assert found.summary["local.lr"].tolist() == [1e-3, 5e-3]
    assert found.summary.final_accuracy.notna().tolist() == [True, False]
    assert found.rounds.groupby("local.lr").size().tolist() == [2, 1]
    assert found.folders[found.summary.run[1]] == study / "runs/fedit/0.005"
    shown = repr(found)
    assert "Results of 2 runs" in shown
    assert "fedit, local.lr=0.005, seed 0: 1 rounds, not finished" in shown


def test_several_folders_are_one_comparison(study: Path, done: tuple[Path, Any]) -> None:
    found = polyrank.load(study, done[0])
    assert len(found) == 3
    assert found.summary.method.tolist() == ["fedit", "fedit", "hralora"]
    assert found.summary["local.lr"].isna().tolist() == [False, False, True]


def test_what_is_run_in_place_of_a_federation_is_its_own_method(tmp_path: Path) -> None:
    resolved = {"method": {"name": "fedit"}, "seed": 3, "regime": "zero_shot"}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(resolved))
    found = polyrank.load(tmp_path)
    assert found.summary.method.tolist() == ["zero_shot"]
    for frame in (found.rounds, found.clients, found.layers):
        assert len(frame) == 0
        assert "round" in frame


def test_what_holds_no_run_is_refused(tmp_path: Path, study: Path, digits_file: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        polyrank.load(tmp_path)
    with pytest.raises(RunError, match="named twice"):
        polyrank.load(study, study)
    with pytest.raises(InputError, match="already holds a run"):
        polyrank.run(digits_file, out=study / "runs" / "fedit" / "0.001")
    with pytest.raises(InputError, match="Did you mean 'rounds'"):
        polyrank.run(digits_file, {"round": 2}, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_pandas_all_but_frames_is_there(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    found = polyrank.load(study)
    assert "fedit" in repr(found)
    with pytest.raises(ImportError, match="pip install pandas"):
        _ = found.summary

"""Folders to values: what is read, what may be missing, and what is said about it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from polyrank.errors import InputError
from polyrank.report.gather import gather
from recorded import write_run, write_study


def test_a_study_is_read_whole(tmp_path: Path) -> None:
    found = gather([write_study(tmp_path / "study", seeds=(1, 0))])
    assert found.name == "digits"
    assert found.notes == ()
    assert [entry.label for entry in found.entries] == ["single", "hralora", "hetlora", "fedit", "local", "zero_shot"]
    assert [run.seed for run in found.entries[1].runs] == [0, 1]
    assert [entry.federated for entry in found.entries] == [False, True, True, True, False, False]
    run = found.entries[2].runs[0]
    line = json.loads((run.folder / "rounds.jsonl").read_text().splitlines()[0])
    assert run.rounds[0].bytes_up == sum(line["bytes_up"].values())
    assert run.rounds[0].loss == pytest.approx(np.mean(list(line["losses"].values())))
    ranks = {
        c: dict(zip(run.modules, row, strict=True))
        for c, row in zip(run.rounds[0].asked, run.rounds[0].ranks, strict=True)
    }
    assert ranks == line["ranks"]


def test_ranks_of_some_layers_land_where_they_belong(tmp_path: Path) -> None:
    run = gather([write_run(tmp_path / "run", "hralora")]).runs[0]
    for line, read in zip((run.folder / "rounds.jsonl").read_text().splitlines(), run.rounds, strict=True):
        for client, row in zip(read.asked, read.ranks, strict=True):
            kept = {name: rank for name, rank in zip(run.modules, row, strict=True) if rank}
            assert kept == json.loads(line)["ranks"][client]


def test_an_old_run_lacks_much(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "hralora")
    for name in ("setting.json", "confusion.json", "timings.jsonl", "summary.json"):
        (folder / name).unlink()
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("scores", "client_metrics", "predicted_memory", "aggregation_error", "refused"):
            del line[key]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"round": 3, "fac')
    run = gather([folder]).runs[0]
    assert (run.facts, run.confusion, run.measured_memory, run.summary) == ({}, None, None, None)
    assert len(run.rounds) == 3
    assert run.rounds[0].memory is None
    assert run.rounds[0].error is None
    assert all(r.ranks.shape == (6, len(run.modules)) for r in run.rounds)


def test_what_is_unfinished_is_said(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("fedit", "hralora"))
    (study / "runs/fedit/seed-1/summary.json").unlink()
    shutil.rmtree(study / "runs/hralora/seed-0")
    notes = " ".join(gather([study]).notes)
    assert "1 of 4 runs of digits have not begun" in notes
    assert "fedit is unfinished (seed 1 after round 3) and is not counted" in notes
    assert "same seeds" in notes


def test_unequal_terms_are_said(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("fedit", "hralora"), (0,))
    path = study / "runs/hralora/seed-0/experiment.yaml"
    path.write_text(path.read_text().replace("alpha: 0.5", "alpha: 5.0"))
    (note,) = gather([study]).notes
    assert "data.partition.alpha (0.5, 5.0)" in note


def test_loose_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "fedit", setting={"local.lr": 0.1}),
        write_run(tmp_path / "b", "fedit", setting={"local.lr": 0.2}),
        write_run(tmp_path / "c", "hralora", setting={"local.lr": 0.1}),
    ]
    found = gather(folders)
    assert [entry.label for entry in found.entries] == ["fedit · lr=0.1", "fedit · lr=0.2", "hralora"]
    assert found.name == "a, b, c"


def test_a_seed_counts_once(tmp_path: Path) -> None:
    found = gather([write_run(tmp_path / "a", "fedit", done=1), write_run(tmp_path / "b", "fedit")])
    assert [run.folder.name for run in found.runs] == ["b"]
    assert "several runs of fedit with seed 0" in found.notes[0]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: neither a run nor a study"):
        gather([tmp_path / "nothing"])
    run = write_run(tmp_path / "run", "fedit")
    (run / "rounds.jsonl").write_text('{"round": 0}\n')
    with pytest.raises(InputError, match=r"rounds.jsonl: line 1 is not the record of a round: factors: missing"):
        gather([run])
    (run / "experiment.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"experiment\.yaml: not a resolved experiment"):
        gather([run])
    (tmp_path / "study.json").write_text(json.dumps({"name": "x", "cells": [{}]}))
    with pytest.raises(InputError, match=r"study\.json: cells\.0\.run: missing"):
        gather([tmp_path])
    (tmp_path / "study.json").write_text(json.dumps({"name": "x", "cells": []}))
    with pytest.raises(InputError, match="no runs yet"):
        gather([tmp_path])
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study\.json: not JSON"):
        gather([tmp_path])


def test_a_grid_is_named_by_what_varies(tmp_path: Path) -> None:
    cells = []
    for lr in (0.1, 0.2):
        setting = {"local.lr": lr, "local.epochs": 2}
        write_run(tmp_path / f"runs/{lr}", "fedit", setting=setting)
        cells.append({"run": f"runs/{lr}", "method": "fedit", "setting": setting, "seed": 0})
    (tmp_path / "study.json").write_text(json.dumps({"name": "grid", "cells": cells}))
    found = gather([tmp_path])
    assert [entry.setting for entry in found.entries] == ["lr=0.1", "lr=0.2"]
    assert found.notes == ()


def test_settings_that_differ_are_never_one(tmp_path: Path) -> None:
    keys = ("local.lr", "local.epochs", "data.hold_out", "data.x")
    rows = [(0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 2)]
    cells = []
    for row in rows:
        setting = dict(zip(keys, row, strict=True))
        where = "-".join(map(str, row))
        write_run(tmp_path / where, "fedit", setting=setting)
        cells.append({"run": where, "method": "fedit", "setting": setting, "seed": 0})
    (tmp_path / "study.json").write_text(json.dumps({"name": "grid", "cells": cells}))
    assert [entry.setting for entry in gather([tmp_path]).entries][1:] == [
        "lr=1, epochs=1, hold_out=1, x=1",
        "lr=1, epochs=1, hold_out=1, x=2",
    ]
    (tmp_path / "study.json").write_text(json.dumps({"name": "grid", "cells": cells[:2]}))
    assert [entry.setting for entry in gather([tmp_path]).entries] == [
        "lr=0, epochs=0, hold_out=0, 1 more",
        "lr=1, epochs=1, hold_out=1, 1 more",
    ]

"""`polyrank plan` and `polyrank profile`, as a user runs them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DistilBertConfig
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.costs import memory
from polyrank.experiment.build import build
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import load
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run

PAPER = Path(__file__).parents[1] / "experiments" / "rank_estimator.yaml"
runner = CliRunner()


def shown(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    return result.output.replace("\n", " ")


def planned(*arguments: object) -> dict[str, Any]:
    return json.loads(shown("plan", *arguments, "--json"))


def test_the_published_rank_estimator() -> None:
    planned(PAPER)  # imports what it needs
    before = time.process_time()  # others may use the machine
    found = planned(PAPER)
    assert time.process_time() - before < 2
    assert [group["budget"] for group in found["groups"]] == [288, 432, 576]
    assert [group["rank"] for group in found["groups"]] == [12, 18, 24]
    assert [group["limit"] for group in found["groups"]] == ["upload"] * 3
    assert [group["clients"] for group in found["groups"]] == [6, 6, 8]
    for group in found["groups"]:
        [traffic] = group["traffic"]
        assert traffic["bytes_up"] == 73_728 * group["rank"]
        assert 0.99 < traffic["seconds"]["upload"] <= 1
        assert group["peak_memory"] == pytest.approx(sum(group["peak"].values()))
        assert group["peak_memory"] < group["memory"]
        assert set(group["ranks"].values()) == {group["rank"]}


def test_the_published_curve_in_the_plan() -> None:
    steps = planned(PAPER)["curves"]["upload"]
    for speed, budget in ((1, 24), (7, 264), (15, 600), (30, 1200), (50, 2016), (80, 3240)):
        assert max(b for need, b in steps if need <= speed * 1e6) == budget


def test_a_plan_opens_no_connection_and_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("a connection was opened"))
    assert not list(PAPER.parent.rglob("*.safetensors"))
    planned(PAPER)


def test_what_a_person_reads() -> None:
    text = shown("plan", PAPER)
    for part in ("288", "432", "576", "upload", "7.08 Mbit/s", "7.67 Mbit/s (+8.3%)", "activations", "884.7 kB"):
        assert part in text


def test_ranks_by_layer_are_shown_where_they_differ_by_layer() -> None:
    assert "ranks in round 1" not in shown("plan", PAPER)
    assert "ranks in round 1" in shown("plan", PAPER, "--set", "method={name: fedra, estimate: least, rank: 24}")


def test_who_can_afford_more_than_the_server_has_is_held_to_it() -> None:
    lines = [line.split() for line in shown("plan", PAPER, "--set", "model.rank=20").splitlines()]
    assert ["strong", "8", "576", "server", "rank", "20", "-", "-"] in lines


def test_the_picture(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "new" / "b.png"
    for path in (first, second):
        assert str(path) in shown("plan", PAPER, "--png", path).replace("\n", "")
    assert first.read_bytes()[:4] == b"\x89PNG"
    assert first.read_bytes() == second.read_bytes()


def test_a_client_that_cannot_hold_rank_one_is_told_what_would_help() -> None:
    text = shown("plan", PAPER, "--set", "fleet.0.memory=700 MiB", "--set", "fleet.1.uplink=0.5 Mbit/s")
    assert "weak: not even rank 1 fits its memory; would help: batch 8, or checkpointing" in text
    assert "middle: not even rank 1 fits its upload; would help: 1.18 seconds" in text
    found = planned(PAPER, "--set", "fleet.0.memory=700 MiB")["groups"][0]
    assert (found["budget"], found["limit"], found["peak"]) == (0, "memory", None)


def test_nobody_can_afford_anything() -> None:
    few = "fleet=[{memory: 100 MiB}]"
    assert "no client can afford rank 1" in refused("plan", PAPER, "--set", few)


def test_only_what_is_trained_travels() -> None:
    both = planned(PAPER, "--set", "method.name=fedit")["groups"][0]["traffic"]
    turns = planned(PAPER, "--set", "method.factors={name: alternating, warmup: 2}")["groups"][0]["traffic"]
    assert [(entry["round"], entry["factors"]) for entry in turns] == [(0, "AB"), (2, "B"), (3, "A")]
    assert turns[0]["bytes_up"] == both[0]["bytes_up"] == 2 * turns[1]["bytes_up"] == 2 * turns[2]["bytes_up"]
    assert len({entry["bytes_down"] for entry in turns}) == 1


def test_the_plan_s_bytes_are_the_run_s(digits_file: Path) -> None:
    """What is predicted per group is what the run's messages weigh, and its memory what the run records."""
    groups = planned(digits_file)["groups"]
    experiment = on_this_machine(load(digits_file, ["simulation.together=off"]))  # alone, each has a measured memory
    session = Session(Run.create(digits_file.parent / "run", experiment), build(experiment))
    for record, _ in session.rounds():
        for index, client in enumerate(sorted(record.bytes_up)):
            group = groups[index // 2]
            assert record.bytes_up[client] == group["traffic"][0]["bytes_up"]
            assert record.bytes_down[client] == group["traffic"][0]["bytes_down"]
            assert record.predicted_memory[client] == group["peak_memory"]
            measured = record.measured_memory[client]
            parts = {**group["peak"], "working": 0, "overhead": 0}
            assert measured == pytest.approx(sum(parts.values()), rel=0.02)  # a last batch may be smaller
    lines = (session.run.folder / "timings.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"round", "wall_seconds", "measured_memory"}] * 3
    assert "measured_memory" not in (session.run.folder / "rounds.jsonl").read_text()


def test_this_machine_s_own_view() -> None:
    [group] = planned(PAPER, "--here")["groups"]
    assert group["name"] == "this machine"
    assert group["memory"] > 2**28
    assert group["limit"] in ("memory", "full rank")
    [other] = planned(PAPER, "--here", "--set", "fleet.0.uplink=7.08 Mbit/s")["groups"]
    assert (other["budget"], other["limit"]) == (288, "upload")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("fleet.0.uplink=-7 Mbit/s", "fleet.0.uplink: '-7 Mbit/s' must be more than 0"),
        ("fleet.0.uplink=7 parsec/s", "fleet.0.uplink: '7 parsec/s' is not a quantity"),
        ("fleet.0.uplink=7", "fleet.0.uplink: 7 needs a unit"),
        ("fleet.0.memory=some", "fleet.0.memory: 'some' is not a quantity"),
        ("method.estimate.upload=0", "method.estimate.upload: 0"),
        ("method.estimate=by_memry", "Did you mean 'by_memory'?"),
        ("method.estimate=fixed", "states no rank; give fleet[].rank or method.estimate.rank, or derive it"),
        ("costs.calibration=nowhere.json", "not a calibration"),
        ("fleet.0={share: 1/3, rank: 30}", "fleet.0.rank: 30 exceeds model.rank, 20"),
    ],
)
def test_mistakes(override: str, part: str) -> None:
    assert part in refused("plan", PAPER, "--set", "model.rank=20", "--set", override)


# --- measuring


@pytest.fixture
def unknown_family(tmp_path: Path) -> Path:
    """An experiment with a model whose family has no formula."""
    DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24).save_pretrained(tmp_path / "model")
    path = tmp_path / "odd.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "rounds": 1,
                "model": {"name": "model", "targets": ["q_lin", "v_lin"], "max_length": 12},
                "data": {"name": "files", "train": "a.csv", "test": "b.csv", "text": "text", "classes": ["x", "y"]},
                "fleet": [{"memory": "100 MiB"}],
                "method": {"name": "fedit", "estimate": "by_memory"},
                "local": {"batch": 4},
            }
        )
    )
    return path


def test_a_family_without_a_formula_is_measured(unknown_family: Path, tmp_path: Path) -> None:
    message = refused("plan", unknown_family)
    assert "no formula" in message
    assert "polyrank profile" in message
    calibration = tmp_path / "calibration.json"
    assert "no formula for this family" in shown("profile", unknown_family, "--ranks", "2,4,8", "--out", calibration)
    assert json.loads(calibration.read_text())["per_rank"] > 0
    [group] = planned(unknown_family, "--set", f"costs.calibration={calibration}")["groups"]
    assert group["rank"] == 16
    assert group["peak"]["activations"] > 0
    assert "exists already" in refused("profile", unknown_family, "--out", calibration)


def test_a_profile_measures_what_the_formula_says(digits_file: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = json.loads(shown("profile", digits_file, "--ranks", "2,4", "--json"))
    assert torch.get_num_threads() == threads
    steps = found["measured"]["steps"]
    assert [step["rank"] for step in steps] == [2, 4]
    for step in steps:
        for part in ("base", "adapter", "gradients", "activations"):
            assert step["measured"][part] == step["predicted"][part]
        assert step["measured"]["optimizer"] == pytest.approx(step["predicted"]["optimizer"], rel=0.02)
        assert step["measured"]["peak"] == pytest.approx(step["predicted"]["peak"], rel=0.05)
    assert found["scale"] == 1.0
    assert found["measured"]["resident"] > 2**26
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(found))
    groups = planned(digits_file, "--set", f"costs.calibration={path}")["groups"]
    assert groups[0]["peak"]["overhead"] == found["overhead"] < 2**20
    stated = planned(digits_file, "--set", f"costs.calibration={path}", "--set", "costs.overhead=3 MiB")["groups"]
    assert stated[0]["peak"]["overhead"] == 3 * 2**20


def test_ranks_that_cannot_be_measured(digits_file: Path) -> None:
    for ranks in ("4", "4,4", "4,65"):
        assert "must be at least two ranks between 1 and 64" in refused("profile", digits_file, "--ranks", ranks)


def test_forecast_and_estimator_agree(digits_file: Path) -> None:
    experiment = load(digits_file)
    found = forecast(experiment)
    world = build(on_this_machine(experiment))
    ranks = found["groups"][1]["ranks"]
    assert memory(world.spec, experiment.local_training(), ranks).total == found["groups"][1]["peak_memory"]

"""What federation is held against, what clients are worth on their own data, and the facts beside a run's rounds."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyrank.core.federate import federate, sample
from polyrank.core.lowrank import combine
from polyrank.experiment.build import build
from polyrank.experiment.config import ConfigError
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.local.adapters import read_adapter
from polyrank.local.evaluate import evaluate
from polyrank.methods.named import fedit
from sittings import contents, experiment_of, finished, records, started

Config = dict[str, Any]


@pytest.fixture
def config(digits_config: Config) -> Config:
    config = copy.deepcopy(digits_config)
    config["simulation"] = {"together": "off", "cache": "off"}
    return config


@pytest.mark.parametrize("regime", ["single", "local"])
def test_a_baseline_is_a_run_that_can_be_resumed(tmp_path: Path, config: Config, regime: str) -> None:
    summary = finished(started(tmp_path / "whole", config, regime=regime, cohort=2))
    session = started(tmp_path / "parts", config, regime=regime, cohort=2)
    next(session.rounds())
    resumed = finished(Session(Run.open(tmp_path / "parts")))
    assert all(resumed[key] == summary[key] for key in ("before", "final", "selected"))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert summary["method"] == regime
    assert summary["bytes_up"] == summary["bytes_down"] == 0
    assert summary["final"]["test"]["loss"] < summary["before"]["test"]["loss"]
    assert [record["seconds"] for record in records(tmp_path / "whole")] == [None] * 3


def test_alone_is_a_federation_of_one(tmp_path: Path, config: Config) -> None:
    summary = finished(started(tmp_path / "run", config, regime="local"))
    experiment = experiment_of(config)
    world = build(experiment)
    for client in world.clients.profiles():
        one = world.clients.only([client])
        *_, (state, _) = federate(fedit(), world.start, one, world.spec, experiment.local_training(), rounds=3)
        found, _ = read_adapter(tmp_path / "run" / "adapter" / client)
        whole = combine([state.folded, state.adapter])
        for name, x in found.layers.items():
            due = whole.layers[name]
            assert torch.allclose(x.scale * x.B @ x.A, due.scale * due.B @ due.A, atol=1e-6)
        with world.base.attached(whole) as model:
            assert evaluate(model, world.splits["test"]) == pytest.approx(summary["final"]["alone"][client])
    accuracies = [metrics["accuracy"] for metrics in summary["final"]["alone"].values()]
    assert summary["final"]["test"]["accuracy"] == pytest.approx(np.mean(accuracies))


def test_alone_a_client_trains_when_it_would_be_asked(tmp_path: Path, config: Config) -> None:
    finished(started(tmp_path / "run", config, regime="local", cohort=1, rounds=2))
    names = sorted(build(experiment_of(config)).clients.profiles())
    asked = {client for round_ in range(2) for client in sample(names, 1, round_, config["seed"])}
    assert [list(record["losses"]) for record in records(tmp_path / "run")] == [
        sample(names, 1, t, 0) for t in range(2)
    ]
    for client in names:
        adapter, _ = read_adapter(tmp_path / "run" / "adapter" / client)
        learnt = any(x.B.any() for x in adapter.layers.values())
        assert learnt == (client in asked)


def test_the_pooled_run_takes_the_cohorts_steps_on_everybodys_data(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config, regime="single", cohort=2)
    finished(session)
    everybody = sum(len(share) for share in session.world.clients.shares.values())
    assert [record["examples"] for record in records(tmp_path / "run")] == [{"pooled": everybody}] * 3
    assert set(records(tmp_path / "run")[0]["ranks"]["pooled"].values()) == {session.world.rank}


def test_zero_shot_is_the_model_as_it_starts(tmp_path: Path, config: Config) -> None:
    summary = finished(started(tmp_path / "run", config, regime="zero_shot"))
    assert summary["final"]["test"] == summary["before"]["test"]
    assert (summary["rounds"], summary["final"]["round"], summary["selected"]) == (0, None, None)
    assert records(tmp_path / "run") == []
    assert Run.open(tmp_path / "run").summary() is not None


def test_baselines_belong_to_a_federated_run(config: Config) -> None:
    with pytest.raises(ConfigError, match="baselines: local: of a federated run, not of regime single"):
        experiment_of(config, regime="single", baselines=["local"])


# --- each client's own examples


@pytest.mark.parametrize("regime", ["federated", "local"])
def test_clients_evaluate_on_examples_that_nobody_trains_on(tmp_path: Path, config: Config, regime: str) -> None:
    asked = {"clients": True, "client_hold_out": 0.3, "every": 2}
    session = started(tmp_path / "run", config, regime=regime, evaluate=asked)
    summary, world = finished(session), session.world
    without = build(experiment_of(config))
    for client, own in world.held_out.items():
        trained = world.clients.shares[client]
        assert len(own) == max(round(0.3 * (len(own) + len(trained))), 1)
        assert sorted([*own, *trained]) == sorted(without.clients.shares[client])
        assert world.clients.profiles()[client].examples == len(trained)
    found = records(tmp_path / "run")
    assert [bool(record["client_metrics"]) for record in found] == [False, True, True]
    assert summary["final"]["clients"] == found[-1]["client_metrics"]
    for client, parts in session.course.models(session.state).items():
        clients = [client] if client else list(world.held_out)
        with world.base.attached(combine(parts)) as model:
            for each in clients:
                due = evaluate(model, world.splits["train"], world.held_out[each])
                told = found[-1]["client_metrics"][each]
                assert told == pytest.approx({"accuracy": due["accuracy"], "loss": due["loss"]}, rel=1e-5)


def test_so_many_clients_evaluate_as_were_asked_for(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config, rounds=2, evaluate={"clients": 2})
    finished(session)
    evaluated = [list(record["client_metrics"]) for record in records(tmp_path / "run")]
    assert evaluated == [session.evaluated] * 2
    assert len(session.evaluated) == 2


def test_a_client_with_one_example_keeps_none(config: Config) -> None:
    config["data"] |= {"clients": 90, "limit": {"train": 96}, "partition": {"name": "iid"}}
    world = build(experiment_of(config, evaluate={"clients": True}))
    sizes = [(len(world.held_out[client]), len(share)) for client, share in world.clients.shares.items()]
    assert set(sizes) == {(0, 1), (1, 1)}


# --- the files beside the rounds


def test_the_confusion_of_the_final_model_is_counted_by_class(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config)
    summary = finished(session)
    found = json.loads((tmp_path / "run" / "confusion.json").read_text())
    counts, truth = np.array(found["counts"]), session.world.splits["test"].labels
    assert found["classes"] == [str(digit) for digit in range(10)]
    assert counts.sum(axis=1).tolist() == np.bincount(truth, minlength=10).tolist()
    assert counts.trace() / counts.sum() == pytest.approx(summary["final"]["test"]["accuracy"])


def test_facts_of_a_run_are_written_once(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config)
    finished(session)
    found = json.loads((tmp_path / "run" / "setting.json").read_text())
    assert [(g["name"], g["clients"], g["rank"], g["uplink"]) for g in found["groups"]] == [
        ("small", 2, 2, 1e6),
        ("large", 2, 4, 2e6),
    ]
    assert {name: tuple(x["shape"]) for name, x in found["modules"].items()} == dict(session.world.spec.modules)
    assert [x["block"] for x in found["modules"].values()] == [0, 0, 1, 1, 2, 2, 3, 3]
    examples = {client: member["examples"] for client, member in found["members"].items()}
    assert examples == {client: len(share) for client, share in session.world.clients.shares.items()}
    assert found["dense"] == sum(t.numel() for t in session.world.start.adapter.dense.values())


def test_scores_are_on_record_where_they_were_made_anew(tmp_path: Path, config: Config) -> None:
    method = {"name": "fim_hla", "every": 2}
    session = started(tmp_path / "run", config, method=method, data={**config["data"], "importance": 20})
    finished(session)
    made = [bool(record["scores"]) for record in records(tmp_path / "run")]
    assert made == [True, False, True]
    assert records(tmp_path / "run")[2]["scores"] == session.state.scores
    finished(started(tmp_path / "alike", config))
    assert [record["scores"] for record in records(tmp_path / "alike")] == [{}] * 3

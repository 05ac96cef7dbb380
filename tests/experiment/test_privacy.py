"""Runs with differential privacy: they repeat, resume, say what they have spent, and refuse what would not hold."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.privacy import ClientPrivacy, ExamplePrivacy, Privacy
from polyrank.core.types import ClientProfile, LocalTraining
from polyrank.experiment.config import ConfigError
from polyrank.experiment.loading import parse
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.privacy import LINEAR, Spent
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run
from polyrank.methods import AGGREGATORS, METHODS
from sittings import contents, experiment_of, finished, records, started

Config = dict[str, Any]
FORMS: dict[str, Config] = {
    "central": {"clients": {"clip": 0.5, "noise": 0.2}},
    "client": {"clients": {"clip": 0.5, "noise": 0.2, "where": "client"}},
    "examples": {"examples": {"clip": 1.0, "noise": 0.8}},
    "both": {"clients": {"clip": 0.5, "noise": 0.2}, "examples": {"clip": 1.0, "noise": 0.8, "delta": 1e-6}},
}


@pytest.fixture
def config(digits_config: Config) -> Config:
    return copy.deepcopy(digits_config)


def by_opacus(history: list[tuple[float, float, int]], delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = history
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("form", FORMS)
def test_a_private_run_trains_repeats_and_resumes_to_the_same_bytes(form: str, tmp_path: Path, config: Config) -> None:
    changes = {"privacy": FORMS[form], "cohort": 3, "absent": 0.2}
    summary = finished(started(tmp_path / "whole", config, **changes))
    next(started(tmp_path / "halves", config, **changes).rounds())
    resumed = finished(Session(Run.open(tmp_path / "halves")))
    assert contents(tmp_path / "whole") == contents(tmp_path / "halves")
    assert summary["privacy"] == resumed["privacy"]
    found = records(tmp_path / "whole")
    for record in found:
        assert record["losses"] == {}
        assert np.isfinite(record["metrics"]["validation/loss"])
        if "clients" in FORMS[form]:
            assert set(record["examples"].values()) == {1.0}
    for kind in FORMS[form]:
        spent = [record["metrics"][f"privacy/{kind}"] for record in found]
        assert 0 < spent[0] <= spent[1] <= spent[2]
        assert summary["privacy"][kind]["epsilon"] == spent[-1]
    assert (found[0]["aggregation_error"] is None) == (form in ("central", "both"))


@pytest.mark.parametrize("form", ["central", "client", "examples"])
def test_noise_is_of_the_run_and_changes_it(form: str, tmp_path: Path, config: Config) -> None:
    quiet = {kind: {**own, "noise": 1e-6} for kind, own in FORMS[form].items()}
    for name, privacy in (("loud", FORMS[form]), ("quiet", quiet)):
        next(started(tmp_path / name, config, privacy=privacy).rounds())
    name = "state/checkpoint.safetensors"
    assert contents(tmp_path / "loud")[name] != contents(tmp_path / "quiet")[name]


def test_epsilon_is_opacus_for_the_client_that_was_asked_most(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config, privacy=FORMS["both"], cohort=2, absent=0.3, rounds=4)
    profiles = session.world.clients.profiles()
    asked: Counter[str] = Counter()
    for record, _ in session.rounds():
        asked.update(list(record.bytes_down))
        assert record.metrics["privacy/clients"] == pytest.approx(by_opacus([(0.2, 1.0, max(asked.values()))], 1e-5))
        spent = []
        for client, rounds in asked.items():
            rate = min(1.0, 16 / profiles[client].examples)
            spent.append(by_opacus([(0.8, rate, rounds * int(np.ceil(1 / rate)))], 1e-6))
        assert record.metrics["privacy/examples"] == pytest.approx(max(spent))


def test_what_clients_send_themselves_counts_twice() -> None:
    profiles = {"a": ClientProfile(9), "b": ClientProfile(9)}
    records = [
        {"bytes_down": {"a": 1000}, "examples": {"a": 1.0}},
        {"bytes_down": {"a": 1000, "b": 10}, "examples": {}},
    ]
    spent = Spent(Privacy(ClientPrivacy(0.1, 3.0, "client")), LocalTraining(), lambda: profiles, records)
    assert spent.metrics() == {"privacy/clients": pytest.approx(by_opacus([(1.5, 1.0, 2)], 1e-5))}
    spent.add({"b": 7, "a": 7}, {})
    assert spent.metrics() == {"privacy/clients": pytest.approx(by_opacus([(1.5, 1.0, 3)], 1e-5))}


def test_nothing_is_spent_on_clients_without_examples_or_rounds() -> None:
    profiles = {"a": ClientProfile(0)}
    spent = Spent(Privacy(examples=ExamplePrivacy(1.0, 1.0)), LocalTraining(), lambda: profiles)
    assert spent.metrics() == {"privacy/examples": 0.0}
    spent.add(["a"], {})
    assert spent.metrics() == {"privacy/examples": 0.0}
    assert Spent(Privacy(), LocalTraining(), lambda: profiles).metrics() == {}


def test_a_client_that_has_left_counts_with_the_examples_of_its_update() -> None:
    privacy, local = Privacy(examples=ExamplePrivacy(1.0, 1.0)), LocalTraining(batch=10)
    there = {"a": ClientProfile(100), "b": ClientProfile(1000)}
    records = [{"bytes_down": {"a": 1, "b": 1}, "examples": {"a": 100.0}}]
    with_it = Spent(privacy, local, lambda: there, records).metrics()["privacy/examples"]
    assert Spent(privacy, local, lambda: {"b": there["b"]}, records).metrics() == {"privacy/examples": with_it}
    assert with_it == pytest.approx(by_opacus([(1.0, 0.1, 10)], 1e-5))


def test_several_processes_train_the_same_bytes(tmp_path: Path, config: Config) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        privacy = {**FORMS["client"], **FORMS["examples"]}
        simulation = {"workers": workers, "together": "off"}
        session = started(tmp_path / name, config, privacy=privacy, simulation=simulation, threads=workers)
        next(session.rounds())
    name = "state/checkpoint.safetensors"
    assert contents(tmp_path / "one")[name] == contents(tmp_path / "two")[name]


def test_a_run_without_privacy_says_nothing_of_it(tmp_path: Path, config: Config) -> None:
    session = started(tmp_path / "run", config, rounds=1)
    summary = finished(session)
    assert "privacy" not in summary
    (record,) = records(tmp_path / "run")
    assert not any(key.startswith("privacy/") for key in record["metrics"])
    assert record["losses"]


@pytest.mark.parametrize("method", METHODS)
def test_noise_on_the_server_needs_a_linear_rule(method: str, config: Config) -> None:
    rule = METHODS[method]().aggregate
    linear = {AGGREGATORS[name] for name in LINEAR}
    valid = getattr(rule, "func", rule) in linear and method != "hetlora"
    if valid:
        assert experiment_of(config, method=method, privacy=FORMS["central"]).protection().on_server is not None
        return
    with pytest.raises(ConfigError, match=r"hetlora|Valid: fedit .*or where: client") as caught:
        experiment_of(config, method=method, privacy=FORMS["central"])
    own = {"raflora": "rb_lora"}.get(method, method)
    assert own in str(caught.value)
    if method != "hetlora":
        assert experiment_of(config, method=method, privacy=FORMS["client"]).protection().on_client is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hetlora", "privacy": FORMS["examples"]}, "tail penalty.*Valid: hetlora_uniform"),
        ({"method": "hetlora", "privacy": FORMS["client"]}, "tail penalty"),
        (
            {"method": {"name": "fedit", "aggregate": {"name": "hetlora"}}, "privacy": FORMS["central"]},
            "hetlora with weights: norm",
        ),
        (
            {"method": {"name": "fedit", "dispatch": {"scaling": "lora"}}, "privacy": FORMS["central"]},
            "dispatch.scaling is lora",
        ),
        (
            {"method": {"name": "fedit", "score": {"name": "fisher", "on": "clients"}}, "privacy": FORMS["client"]},
            "method.score: fisher, on: clients.*Valid: on: holdout",
        ),
        ({"local": {"checkpointing": True}, "privacy": FORMS["examples"]}, "local.checkpointing: true"),
        ({"local": {"group_by_length": True}, "privacy": FORMS["examples"]}, "local.group_by_length: true"),
        ({"privacy": {"clients": {"clip": -1.0, "noise": 1.0}}}, "privacy.clients.clip: -1.0"),
        ({"privacy": {"clients": {"clip": 1.0}}}, "privacy.clients.noise: missing"),
        ({"privacy": {"examples": {"clip": 1.0, "noise": 1.0, "where": "client"}}}, "unknown key 'where'"),
        ({"privacy": {"client": {}}}, "unknown key 'client'. Did you mean 'clients'"),
    ],
)
def test_what_would_not_hold_is_refused(changes: Config, message: str, config: Config) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of(config, **changes)


def test_the_resolved_experiment_loads_again(config: Config) -> None:
    experiment = experiment_of(config, privacy=FORMS["both"])
    again = parse(experiment.resolved(), "again", Path())
    assert again.protection() == experiment.protection()
    assert experiment_of(config).protection() == Privacy()


def test_hidden_states_are_not_kept_for_random_samples(config: Config) -> None:
    changes = {"privacy": FORMS["examples"], "simulation": {"cache": "1 GiB"}}
    assert on_this_machine(experiment_of(config, **changes)).simulation.cache == "off"


def test_opacus_is_asked_for_before_anything_is_trained(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"pip install opacus \(the extra 'privacy'\)"):
        started(tmp_path / "run", config, privacy=FORMS["client"])


def test_opacus_is_not_loaded_where_nobody_asks_for_privacy() -> None:
    code = "import json, sys, polyrank.experiment.session; print(json.dumps('opacus' in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout.splitlines()[-1]) is False


def test_the_terminal_shows_what_was_spent(tmp_path: Path, digits_file: Path) -> None:
    arguments = ["run", digits_file, "--out", tmp_path / "run", "--set", "privacy.clients={clip: 0.5, noise: 2.0}"]
    shown = CliRunner().invoke(app, [*map(str, arguments), "--set", "rounds=2"], catch_exceptions=False).stdout
    expected = [by_opacus([(2.0, 1.0, rounds)], 1e-5) for rounds in (1, 2)]
    lines = [line for line in shown.splitlines() if line.startswith("round ")]
    assert [f"epsilon (clients) {value:.2f}  up" in line for value, line in zip(expected, lines, strict=True)] == [
        True
    ] * 2
    assert f"epsilon (clients) at delta 1e-05: {expected[1]:.2f}" in shown

"""Loggers: what they are told, that they cost no run, and what TensorBoard, W&B and MLflow hold after kills."""

import contextlib
import copy
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.core.types import ClientProfile
from polyrank.errors import InputError
from polyrank.experiment.config import ConfigError
from polyrank.experiment.logs import Logs, openers, scalars
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.store import Run
from sittings import Config, contents, experiment_of, finished, records, started

ROUNDS = 4


@pytest.fixture
def config(digits_config: Config) -> Config:
    config = copy.deepcopy(digits_config)
    config["data"] |= {"clients": 2, "limit": {"train": 32, "validation": 20, "test": 20}}
    return config | {"rounds": ROUNDS, "device": "cpu", "simulation": {"together": "off", "cache": "off"}}


def resumed(folder: Path) -> dict[str, Any]:
    from polyrank.experiment.session import Session

    session = Session(Run.open(folder))
    with session.logs:
        return finished(session)


def stopped(folder: Path, config: Config, rounds: int) -> None:
    """A run that stops after so many rounds."""
    session = started(folder, config)
    with session.logs:
        for _, (record, _) in zip(range(rounds), session.rounds(), strict=False):
            assert record.round < rounds


# --- what is told


RECORD = {
    "round": 1,
    "lr": 0.01,
    "ranks": {"a": {"q": 2, "v": 2}, "b": {"q": 4}, "c": {"q": 1, "v": 0}},
    "bytes_down": {"a": 10, "b": 20, "c": 30},
    "bytes_up": {"a": 1, "b": 2},
    "losses": {"a": 1.0, "b": 2.0},
    "dropped": ["c"],
    "refused": {},
    "seconds": None,
    "metrics": {"validation/accuracy": 0.5, "privacy/clients": 3.0},
    "aggregation_error": None,
    "client_metrics": {"a": {"accuracy": 0.25, "loss": 1.0}, "b": {"accuracy": 0.75, "loss": 1.0}},
}
PROFILES = {"a": ClientProfile(1, group="small"), "b": ClientProfile(1, group="large"), "c": ClientProfile(1)}


def test_the_figures_of_a_round() -> None:
    assert scalars(RECORD, 7.0, 2, PROFILES) == {
        "validation/accuracy": 0.5,
        "privacy/clients": 3.0,
        "loss/mean": 1.5,
        "bytes/up": 3,
        "bytes/down": 60,
        "seconds/wall": 7.0,
        "clients/answered": 2,
        "clients/dropped": 1,
        "clients/refused": 0,
        "lr": 0.01,
        "client_accuracy/mean": 0.5,
        "client_accuracy/worst": 0.25,
        "group_loss/small": 1.0,
        "group_loss/large": 2.0,
        "group_bytes_up/small": 1,
        "group_bytes_up/large": 2,
        "group_bytes_down/small": 10,
        "group_bytes_down/large": 20,
        "group_bytes_down/all": 30,
        "group_rank/small": 2.0,
        "group_rank/large": 2.0,
        "group_rank/all": 0.5,
        "group_accuracy/small": 0.25,
        "group_accuracy/large": 0.75,
    }


class Kept:
    """A logger in memory; it fails when it is told of the step `fails`."""

    def __init__(self, first: int = 0, fails: int | None = None) -> None:
        self.first, self.fails, self.steps = first, fails, []
        self.ended: Any = "not yet"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails:
            raise OSError("the disk is full")
        self.steps.append(step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self.ended = summary


def test_a_logger_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path: Path, config: Config) -> None:
    logs = Logs(tmp_path, experiment_of(config), 2, lambda: PROFILES)
    good, bad = Kept(), Kept(fails=1)
    logs.loggers = {"bad": bad, "good": good}
    logs.add({**RECORD, "round": 0}, 1.0)
    with pytest.warns(RuntimeWarning, match="log: bad: OSError: the disk is full; the run goes on"):
        logs.add({**RECORD, "round": 1}, 1.0)
    with logs:  # and no second warning
        for number in (2, 3):
            logs.add({**RECORD, "round": number}, 1.0)
    assert (bad.steps, bad.ended) == ([0], "not yet")
    assert (good.steps, good.ended) == ([0, 1, 2, 3], None)


def test_a_logger_is_told_of_what_it_has_not_got(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Kept(first=2)
    monkeypatch.setattr("polyrank.experiment.logs.openers", lambda experiment: {"kept": lambda sitting: log})
    logs = Logs(tmp_path, experiment_of(config), 2, lambda: PROFILES)
    logs.open([{**RECORD, "round": number} for number in range(4)], {})
    logs.finish({"rounds": 4})
    assert (log.steps, log.ended, logs.loggers) == ([2, 3], {"rounds": 4}, {})


def test_a_log_that_cannot_be_opened_stops_the_run_before_it_trains(tmp_path: Path, config: Config) -> None:
    (tmp_path / "run").mkdir()
    session = started(tmp_path / "run", config, log=["tensorboard"])
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(InputError, match="log: tensorboard: cannot be opened"):
        next(session.rounds())
    assert records(tmp_path / "run") == []


# --- what a file may say


def test_what_the_file_leaves_out_is_logged_where_tensorboard_is(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = experiment_of(config)
    assert left_out.resolved()["log"] == "auto"
    assert list(openers(left_out)) == ["tensorboard"]
    monkeypatch.setattr("polyrank.experiment.logs.find_spec", lambda name: None)
    assert openers(left_out) == {}
    assert openers(experiment_of(config, log=[])) == {}


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_named_before_anything_is_made(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**config, "log": [name]}))
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert f"log: {name}: needs" in " ".join(result.output.split())
    assert "pip install" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (["tensorbord"], r"log.0.name: 'tensorbord' is unknown. Did you mean 'tensorboard'\?"),
        ([{"name": "wandb", "mode": "loud"}], "mode: 'loud'"),
        ([{"name": "wandb", "projekt": "x"}], "unknown key 'projekt'"),
    ],
)
def test_mistakes_in_the_file(config: Config, log: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment_of(config, log=log)


def test_a_store_without_an_address_is_refused(config: Config) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'polyrank[mlflow]'")
    with pytest.raises(InputError, match=r"log: mlflow: uri: 'mlruns' must be an address: http://"):
        on_this_machine(experiment_of(config, log=[{"name": "mlflow", "uri": "mlruns"}]))


# --- TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, read by TensorBoard itself, which must not have had to purge any."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (folder / "tensorboard").iterdir()
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    read.Reload()
    found = {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}
    raw = Counter((v.tag, event.step) for event in EventFileLoader(str(file)).Load() for v in event.summary.value)
    assert max(raw.values()) == 1
    assert len(raw) == sum(map(len, found.values()))
    return found


def agrees(found: Mapping[str, list[tuple[int, float]]], folder: Path) -> None:
    """The log holds every round's figures once, and the results at the end."""
    rounds = records(folder)
    steps = list(range(len(rounds)))
    for name in ("loss/mean", "bytes/up", "seconds/wall", "group_rank/small", "group_loss/large", "aggregation/error"):
        assert [step for step, _ in found[name]] == steps, name
    assert [value for _, value in found["bytes/up"]] == [sum(r["bytes_up"].values()) for r in rounds]
    for (_, value), record in zip(found["validation/accuracy"], rounds, strict=True):
        assert math.isclose(value, record["metrics"]["validation/accuracy"], rel_tol=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    ((_, test),) = found["test/accuracy"]
    assert math.isclose(test, summary["final"]["test"]["accuracy"], rel_tol=1e-6)


def killed(folder: Path, config: Config, rounds: int) -> None:
    """A run in a process of its own, killed as soon as it has written the records of so many rounds."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "polyrank.cli", "run", str(file), "--out", str(folder), "--quiet"]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            path = folder / "rounds.jsonl"
            if path.is_file() and path.read_bytes().count(b"\n") >= rounds:
                process.kill()
                break
            time.sleep(0.002)
    assert process.returncode == -signal.SIGKILL


def test_tensorboard_holds_every_step_once_after_a_kill(tmp_path: Path, config: Config) -> None:
    config |= {"rounds": 12, "log": ["tensorboard"]}
    killed(tmp_path / "run", config, 3)
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed(tmp_path / "run")
    found = events(tmp_path / "run")
    agrees(found, tmp_path / "run")
    whole = started(tmp_path / "whole", config, log=[])
    finished(whole)
    logged = contents(tmp_path / "run")
    plain = contents(tmp_path / "whole")
    assert logged.keys() == plain.keys()
    assert [name for name in plain if plain[name] != logged[name]] == ["experiment.yaml"]  # which says what is logged


# --- Weights & Biases and MLflow


@pytest.fixture
def nobody_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every proxy is a socket of ours, where nobody must call; and everybody's home is a new folder."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    calls.append(connection.recv(200))
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.upper(), address)
        for name in ("no_proxy", "NO_PROXY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "home"))
        (tmp_path / "home").mkdir()
        yield
        listening.shutdown(socket.SHUT_RDWR)
    assert calls == []


def offline_records(path: Path) -> Iterator[Any]:
    """The messages in W&B's file: blocks of 32 KiB of checked pieces, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, place, held = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def offline_history(folder: Path) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """The run's id, and steps and values by name; results have no step."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    id_, found, results = "", {}, {}
    for record in offline_records(file):
        id_ = record.run.run_id or id_
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
        for item in record.summary.update:
            results[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return id_, {"test/accuracy": [(-1, results.get("test/accuracy"))], **found}


@pytest.mark.usefixtures("nobody_calls")
def test_wandb_offline_holds_every_step_once_after_a_kill(tmp_path: Path, config: Config) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    folder = tmp_path / "run"
    killed(folder, {**config, "rounds": 8, "log": [{"name": "wandb", "project": "p", "group": "g"}]}, 3)
    known = (folder / "wandb" / "id").read_text()
    resumed(folder)
    id_, found = offline_history(folder)
    assert id_ == known == (folder / "wandb" / "id").read_text()
    agrees(found, folder)


def mlflow_history(uri: str, id_: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(id_)
    assert run.data.params["data.clients"] == "2"
    assert run.data.params["fleet.0.name"] == "small"
    history = {name: client.get_metric_history(id_, name) for name in run.data.metrics}
    return run.info.status, {name: [(m.step, m.value) for m in metrics] for name, metrics in history.items()}


@pytest.mark.usefixtures("nobody_calls")
@pytest.mark.parametrize("where", ["own", "folder", "database"])
def test_mlflow_holds_every_step_once_after_a_stop(tmp_path: Path, config: Config, where: str) -> None:
    """In the run's own database, in a folder, which MLflow 3 has stopped working on, and in a database of the user."""
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'polyrank[mlflow]'")
    folder = tmp_path / "run"
    uri = {"own": None, "folder": (tmp_path / "runs").as_uri(), "database": f"sqlite:///{tmp_path}/mlflow.db"}[where]
    log = [{"name": "mlflow", "experiment": "digits", **({"uri": uri} if uri else {})}]
    stopped(folder, {**config, "log": log}, 2)
    store, id_ = uri or f"sqlite:///{folder}/mlflow/mlflow.db", (folder / "mlflow" / "id").read_text()
    status, found = mlflow_history(store, id_)
    assert status == "KILLED"
    assert [step for step, _ in found["round"]] == [0, 1]
    resumed(folder)
    status, found = mlflow_history(store, id_)
    assert status == "FINISHED"
    assert (folder / "mlflow" / "id").read_text() == id_
    agrees(found, folder)


@pytest.mark.usefixtures("nobody_calls")
def test_mlflow_after_a_kill_in_the_middle_of_a_run(tmp_path: Path, config: Config) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'polyrank[mlflow]'")
    folder = tmp_path / "run"
    killed(folder, {**config, "rounds": 8, "log": ["mlflow"]}, 3)
    resumed(folder)
    _, found = mlflow_history(f"sqlite:///{folder}/mlflow/mlflow.db", (folder / "mlflow" / "id").read_text())
    agrees(found, folder)


@pytest.mark.usefixtures("nobody_calls")
def test_mlflow_leaves_no_warning_and_no_thread(tmp_path: Path, config: Config) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'polyrank[mlflow]'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = started(tmp_path / "run", config, log=["mlflow"], rounds=1)
        with session.logs:
            finished(session)
    assert not [thread.name for thread in threading.enumerate() if "elemetry" in thread.name]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"

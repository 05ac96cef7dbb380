"""Real models on real data, where both are present: every experiment that states a figure reaches it.

The adapter of each run is then loaded by PEFT onto a base that is loaded anew, and must give the same test accuracy.
"""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from polyrank.cli import app
from polyrank.experiment.loading import read_yaml

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = {path.stem: path for path in sorted(EXPERIMENTS.glob("*.yaml"))}
STATED = {name: raw for name, path in FILES.items() if "expected" in (raw := read_yaml(path.read_text()))}

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


def missing(raw: dict[str, Any]) -> list[str]:
    """What an experiment names that is not on this machine."""
    name = raw["model"]["name"]
    named = [value for value in raw["data"].values() if isinstance(value, str) and "/" in value]
    absent = [path for path in named if not (EXPERIMENTS / path).exists()]
    if name.startswith("package:"):
        package = name.removeprefix("package:").partition("/")[0]
        return absent + [f"package {package}"] * (importlib.util.find_spec(package) is None)
    return absent + [name] * ("/" in name and not (EXPERIMENTS / name).exists())


def printed(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests run alone, so they may use every core that a run takes by default."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_all_cores")
@pytest.mark.parametrize("name", STATED)
def test_an_experiment_reaches_its_figure(name: str, tmp_path: Path) -> None:
    if absent := missing(STATED[name]):
        pytest.skip(f"not here: {', '.join(absent)}")
    expected = STATED[name]["expected"]
    summary = printed("run", FILES[name], "--out", tmp_path / "run")
    accuracy = summary["final"]["test"]["accuracy"]
    assert accuracy == pytest.approx(expected["accuracy"], abs=expected["tolerance"])
    assert summary["before"]["test"]["accuracy"] < expected["accuracy"] - expected["tolerance"]
    again = printed("evaluate", tmp_path / "run")
    assert again["accuracy"] == accuracy
    assert math.isclose(again["loss"], summary["final"]["test"]["loss"], rel_tol=1e-4)


def test_figures_are_stated() -> None:
    assert STATED.keys() >= {"banking77_minilm", "cifar10_vit", "sst2_minilm"}


@pytest.mark.parametrize("name", ["dolly_llama", "natural_instructions_llama"])
def test_instructions_of_natural_clients(name: str, tmp_path: Path) -> None:
    """A little of each: shares by client, a plan, and a loss that falls within two rounds."""
    if absent := missing(read_yaml(FILES[name].read_text())):
        pytest.skip(f"not here: {', '.join(absent)}")
    planned = printed("plan", FILES[name])
    assert [group["rank"] for group in planned["groups"]] == [4, 8, 16]
    few = ["data.clients=3", "data.limit={train: 900, validation: 8, test: 8}", "rounds=2", "local.steps=2"]
    options = [part for override in [*few, "cohort=3", "model.max_length=256"] for part in ("--set", override)]
    shares = printed("data", FILES[name], *options)
    assert len(shares["clients"]) == 3
    assert sum(client["examples"] for client in shares["clients"]) <= 900
    summary = printed("run", FILES[name], *options, "--out", tmp_path / "run")
    assert summary["final"]["test"]["loss"] < summary["before"]["test"]["loss"]
    held = json.loads((tmp_path / "run" / "setting.json").read_text())["silent"]
    assert 0 < held["train"] < 900

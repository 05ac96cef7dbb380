"""Benches: their page is made of their records, goals are judged, and a round runs by every route with equal losses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from machine import machine
from records import READ, RESULTS, stored
from stopwatch import ratios
from verdicts import cells, lines, verdict

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["performance", "methods", "models", "threats"])
def test_the_page_is_made_of_the_records(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / f"{name}.md").read_text(), f"run: python docs/{name}.py"


@pytest.mark.parametrize(
    ("sense", "figure", "met"), [("at most", 1.1, False), ("at most", 1.0, True), ("at least", 0.9, False)]
)
def test_a_figure_is_judged_by_its_goal(sense: str, figure: float, met: bool) -> None:
    found = verdict("ours", figure, sense, 1.0)
    assert found["met"] is met
    assert cells(found)[-1] == ("met" if met else "MISSED")


def test_a_figure_without_a_goal_is_neither_met_nor_missed() -> None:
    found = verdict("ours", 12345.6, spread={"least": 0.0001234, "most": 2.0})
    assert found["met"] is None
    assert lines([found]) == ["ours    12,346 (1.2e-04 to 2)"]


def test_ratios_are_taken_turn_by_turn() -> None:
    found = ratios([(2.0, 1.0), (9.0, 4.0), (4.0, 3.0)], [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0)])
    assert found["wall"] == {"ratio": 3.0, "least": 2.0, "most": 4.0}
    assert found["cpu"] == {"ratio": 3.0, "least": 1.0, "most": 4.0}


def test_records_of_every_form_are_read() -> None:
    for bench in (*READ, "round"):
        for on, found in stored(bench):
            assert "date" in on
            assert any(v["met"] is not None for v in found)
    assert not stored("no_such_bench")
    assert (RESULTS / "round.json").exists()


def test_a_machine_is_named_whole() -> None:
    found = machine(threads=3)
    assert found["threads"] == 3
    assert all(found[key] for key in ("cpu", "cores", "torch", "transformers", "peft", "platform", "date", "commit"))


@pytest.mark.timeout(300)
def test_a_round_by_all_routes_has_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "round.json"
    command = [
        sys.executable,
        str(ROOT / "bench" / "round.py"),
        "--quick",
        "--batch",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (run,) = json.loads(out.read_text())["runs"]
    for row in (*run["training"], *run["whole"]):
        by_client = [loss for route, loss in row["losses"].items() if route != "centralised"]
        assert by_client == pytest.approx([row["losses"]["ours"]] * len(by_client), rel=1e-5)
    assert {part for v in run["verdicts"] if (part := v["part"])} == {
        "centralised",
        "usual",
        "losses",
        "evaluation",
        "memory",
    }

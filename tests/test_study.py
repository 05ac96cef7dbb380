"""The study: its table is made of its records, and a slice of it runs with every method where its data is present."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import load
from polyrank.methods import METHODS

ROOT = Path(__file__).parents[1]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


study, results = module(ROOT / "bench" / "study.py"), module(ROOT / "docs" / "results.py")


def test_the_page_is_made_of_the_records() -> None:
    assert results.page() == (ROOT / "docs" / "results.md").read_text(), "run: python docs/results.py"


def test_the_study_covers_every_method_setting_and_seed() -> None:
    due = list(study.jobs(smoke=False, only=None))
    assert len(due) == len(set(due)) == 4 * (len(METHODS) - len(study.ALIASES)) * len(study.SEEDS)
    assert {method for _, method, _ in due} == METHODS.keys() - study.ALIASES
    assert set(study.OVERRIDES) <= METHODS.keys()
    assert len(study.SEEDS) >= 3


def test_a_table_of_records() -> None:
    def record(method: str, seed: int, final: float) -> dict[str, object]:
        figures = {"selected": final, "trained": 10.0, "bytes_up": 4e4, "bytes_down": 8e4, "seconds": 1.0}
        return {"method": method, "seed": seed, "final": final, **figures}

    rows = list(results.rows([record("a", 0, 0.1), record("a", 1, 0.2), record("b", 0, 0.5)]))
    assert rows == [
        "| `b` | 50.0 | 50.0 | 10 | 40 kB | 80 kB | 1.0 | 1 |",
        "| `a` | 15.0 ± 7.1 | 15.0 ± 7.1 | 10 | 40 kB | 80 kB | 1.0 | 2 |",
    ]


@pytest.mark.real
@pytest.mark.timeout(1200)
def test_every_method_runs_the_smoke_slice(tmp_path: Path) -> None:
    absent = {file for setting in study.SETTINGS for file in study.missing(setting)}
    if absent:
        pytest.skip(f"not here: {', '.join(sorted(absent))}")
    out = tmp_path / "smoke.json"
    command = [sys.executable, str(ROOT / "bench" / "study.py"), "--smoke", "--jobs", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    runs = json.loads(out.read_text())["runs"]
    assert {run["method"] for run in runs} == METHODS.keys() - study.ALIASES
    assert len(runs) == 2 * len(METHODS.keys() - study.ALIASES)
    for run in runs:
        assert 0 <= run["final"] <= 1
        assert run["trained"] > 0
        assert run["seconds"] > 0
    sizes = {(run["setting"], run["method"]): run["bytes_up"] for run in runs}
    for setting in {setting for setting, _ in sizes}:  # the same budgets for all, and half of a factor for one factor
        assert sizes[setting, "ffa_lora"] < sizes[setting, "fedit"] == sizes[setting, "flexlora"]


def test_the_study_s_settings_plan() -> None:
    for path, overrides in study.SETTINGS.values():
        if not study.missing(next(name for name, value in study.SETTINGS.items() if value[0] == path)):
            assert len(forecast(load(path, overrides))["clients"]) == 12

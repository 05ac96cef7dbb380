"""A pretrained language model on real questions: MMLU by the layout of papers on federated LoRA."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from polyrank.cli import app

SHARED = Path(__file__).parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "llama_stories260k", SHARED / "data"
MMLU, PLAYS = DATA / "mmlu1444" / "test.parquet", DATA / "tiny_shakespeare"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not all(path.exists() for path in (MODEL, MMLU, PLAYS)), reason=f"not all is in {SHARED}"),
]


def printed(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_small_model_guesses_and_learns_to_sound_like_a_play(tmp_path: Path) -> None:
    """Before and after a short run: accuracy is chance, give or take; samples change; PEFT's adapter finds the same."""
    layout = {"instruction": "instruction", "question": "input", "choices": None, "answer": "output"}
    raw = {
        "rounds": 2,
        "cohort": 4,
        "model": {"name": str(MODEL), "targets": "all-linear"},
        "data": {
            "name": "instructions",
            "train": str(PLAYS / "train.parquet"),
            "test": str(PLAYS / "test.parquet"),
            "instruction": None,
            "response": "text",
            "limit": {"train": 400, "test": 50},
            "clients": 4,
        },
        "fleet": [{"rank": 8}],
        "local": {"batch": 8, "lr": 0.005},
        "evaluate": {
            "samples": 50,
            "choices": {"file": str(MMLU), **layout, "subject": "class", "samples": 80},
            "generate": {"samples": 3, "max_tokens": 30},
        },
        "log": [],
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(raw))
    summary = printed("run", tmp_path / "experiment.yaml", "--out", tmp_path / "run")
    for part in ("before", "final"):
        found = summary[part]["choices"]
        assert found["questions"] == 80
        assert found["chance"] == 0.25
        assert abs(found["accuracy"] - 0.25) < 4 * found["error"]
    assert summary["final"]["test"]["loss"] < summary["before"]["test"]["loss"] - 0.5
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())["samples"]
    assert all(sample["before"] != sample["final"] for sample in samples)
    again = printed("evaluate", tmp_path / "run", "--choices", MMLU)
    assert again["accuracy"] == pytest.approx(summary["final"]["choices"]["accuracy"], abs=0.03)

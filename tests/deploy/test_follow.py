"""Following a submitted run by its folder, with a SuperLink that is made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from polyrank.deploy import control, follow
from polyrank.experiment.store import Run


class Shown:
    def __init__(self) -> None:
        self.rounds: list[tuple[int, float | None]] = []

    def add(self, record: Any, seconds: float | None) -> None:
        self.rounds.append((record["round"], seconds))


def test_rounds_are_told_of_once_and_none_is_missed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, shown = Run(tmp_path), Shown()

    def write(*rounds: int) -> None:
        for path, value in ((stored.rounds_file, {"metrics": {}}), (stored.timings_file, {"wall_seconds": 2.0})):
            with open(path, "a") as file:
                file.writelines(json.dumps({"round": number, **value}) + "\n" for number in rounds)

    def status(deployment: object, run_id: str) -> tuple[str, str]:
        write(3)  # what came between the last look and the answer
        stored.summary_file.write_text("{}")
        return follow.COMPLETED, ""

    monkeypatch.setattr(control, "status", status)
    write(0, 1, 2)
    outcome = follow.follow(None, "7", stored, shown, first=1)  # type: ignore[arg-type]
    assert outcome.completed
    assert shown.rounds == [(1, 2.0), (2, 2.0), (3, 2.0)]

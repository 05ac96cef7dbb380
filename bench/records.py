"""What benches have stored, as figures beside goals: for `bench/table.py` and `docs/performance.py`.

A bench stores ``machine`` and ``verdicts`` (`bench/verdicts.py`), or several ``runs`` of them. Those that store figures
and goals in a form of their own are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from verdicts import Verdict, verdict

RESULTS = Path(__file__).parent / "results"

Run = dict[str, Any]


def stored(bench: str) -> list[tuple[dict[str, Any], list[Verdict]]]:
    """The machine and the verdicts of every stored run of a bench; none where nothing is stored."""
    path = RESULTS / f"{bench}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    return [(run["machine"], list(verdicts(bench, run))) for run in record.get("runs", [record])]


def store(path: Path, record: Run) -> None:
    """Writes what a bench measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def verdicts(bench: str, run: Run) -> Iterator[Verdict]:
    if "verdicts" in run:
        yield from run["verdicts"]
    else:
        yield from READ[bench](run)


def aggregate(run: Run) -> Iterator[Verdict]:
    goals = run["goals"]
    for layer in run["layers"]:
        whole = layer["shape"] == "together"  # the goals are for both layers
        for key, name, sense in (
            ("speedup", "dense / ours", "at least"),
            ("error", "error", "at most"),
            ("memory", "peak memory, ours / dense", "at most"),
        ):
            yield verdict(f"{layer['shape']}: {name}", layer[key], sense, goals[key] if whole else None)


def importance(run: Run) -> Iterator[Verdict]:
    goals = {(goal["model"], goal["against"]): goal["speedup"] for goal in run["goals"]["speedups"]}
    for row in run["models"]:
        for route, ratio in row["speedup"].items():
            name = f"{row['model']}: {route} / one pass"
            yield verdict(name, ratio, "at least", goals.get((row["model"], route)))
        yield verdict(f"{row['model']}: error of a score", row["error"], "at most", run["goals"]["error"])


def memory(run: Run) -> Iterator[Verdict]:
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in run["rows"]]
    where = run["machine"]["device"]
    yield verdict(f"{where}: mean error", mean(errors), "at most", run["goals"]["mean"])
    yield verdict(f"{where}: largest error", max(errors), "at most", run["goals"]["largest"])


READ: dict[str, Callable[[Run], Iterator[Verdict]]] = {
    "aggregate": aggregate,
    "importance": importance,
    "memory": memory,
}

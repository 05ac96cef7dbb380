"""Runs from Python: started as the command line starts them, and read into pandas frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.core.types import RoundRecord
from polyrank.experiment import shapes
from polyrank.experiment.build import build
from polyrank.experiment.embedded import embedded
from polyrank.experiment.loading import load as load_experiment
from polyrank.experiment.machine import on_this_machine
from polyrank.experiment.session import Session
from polyrank.experiment.store import Run, RunError, check_free, free_folder
from polyrank.experiment.study import listing

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 12

Record = Mapping[str, Any]
Watch = Callable[[RoundRecord, float], object]


@dataclass(frozen=True)
class Labelled:
    """One run among others.

    Attributes:
        name: of the run, in tables.
        run: its folder.
        method: its method, or what was run in place of one.
        setting: what a study has varied beside methods and seeds.
        seed: its seed.
    """

    name: str
    run: Run
    method: str
    setting: Mapping[str, Any]
    seed: int

    @property
    def labels(self) -> dict[str, Any]:
        """The columns that every frame begins with."""
        return {"run": self.name, "method": self.method, **self.setting, "seed": self.seed}


class Results:
    """What runs have recorded. Frames are made when they are first asked for.

    Every frame begins with ``run``, ``method``, what a study has varied, and ``seed``. Rounds count from 0. Runs that
    are not finished have rounds, and nothing where their results would be.

    Attributes:
        runs: in the order in which they were named.
    """

    def __init__(self, runs: Sequence[Labelled]) -> None:
        self.runs = tuple(runs)

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each run, by its name in the frames."""
        return {cell.name: cell.run.folder for cell in self.runs}

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per run.

        ``rounds``; ``before_``, ``final_`` and ``selected_`` with the name of every test metric; ``selected_round``;
        ``single_accuracy``, ``local_best_accuracy`` and ``local_mean_accuracy`` of baselines, where there are any;
        ``epsilon_clients`` and ``epsilon_examples``, where they are promised; ``bytes_up`` and ``bytes_down``;
        ``seconds``, simulated, and ``wall_seconds`` in rounds.
        """
        return _frame(self.runs, (_summary(cell.run) for cell in self.runs), ("rounds", "final_accuracy"))

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per run and round.

        ``factors``, ``lr``, ``loss`` (the mean over clients), ``asked``, ``answered``, ``dropped`` and ``refused`` (how
        many clients), ``bytes_up``, ``bytes_down``, ``seconds``, ``wall_seconds``, ``aggregation_error``, and every
        metric, such as ``validation_accuracy``.
        """
        return _frame(*_spread(self.runs, _rounds), ("round", "loss", "validation_accuracy"))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row per run, round and client that was asked.

        ``group``, ``examples``, ``loss``, ``rank`` (the sum over its layers), ``bytes_up``, ``bytes_down``,
        ``answered``, ``refused`` (why), ``predicted_memory`` and ``measured_memory`` in bytes, and what the aggregated
        model reached on the client's own held-out data, ``validation_accuracy`` and ``validation_loss``.
        """
        return _frame(*_spread(self.runs, _clients), ("round", "client", "rank"))

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per run, round, client and layer that it trained.

        ``block``, ``rank``, and ``score``: the layer's importance as last measured.
        """
        return _frame(*_spread(self.runs, _layers), ("round", "client", "layer", "rank", "score"))

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        shown = [f"  {line}" for line in map(_line, self.runs[:_SHOWN])]
        more = [f"  and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        runs = f"{len(self)} run{'s' * (len(self) != 1)}"
        return "\n".join([f"Results of {runs}, as frames: summary, rounds, clients, layers", *shown, *more])


def load(*paths: str | Path) -> Results:
    """The results of runs and studies, by their folders.

    Args:
        paths: folders that ``polyrank run`` or ``polyrank compare`` has written; a run need not be finished.

    Raises:
        RunError: if a folder holds neither, or the same run is named twice.
    """
    cells = [cell for path in paths for cell in _labelled(Path(path))]
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"{name}: named twice")
    return Results(cells)


def run(
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    out: str | Path | None = None,
    watch: Watch | None = None,
) -> Results:
    """Runs an experiment to its end, as ``polyrank run`` does, and returns its results.

    Args:
        file: the experiment; the embedded digits one if left out.
        overrides: of keys by dotted path, ``{"local.lr": 1e-3}``, or texts as ``--set`` takes them.
        out: the run's folder, which must not exist or be empty; the first free one of ``runs/NAME`` if left out.
        watch: is called after every round with its record and the seconds that it took.

    Raises:
        InputError: as the command would refuse: for the experiment, the data, the model or the folder.
        TrainingError: if a client's loss leaves the finite numbers.
    """
    session = begin(file, overrides, out)
    with session.logs:
        for record, seconds in session.rounds():
            if watch is not None:
                watch(record, seconds)
        session.finish()
    return load(session.run.folder)


def begin(
    file: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = (), out: str | Path | None = None
) -> Session:
    """A new run with its folder, before its first round. Arguments are those of `run`.

    All that the file asks for has been found to work before a folder is made.
    """
    path = embedded("digits.yaml") if file is None else Path(file)
    if out is not None:
        check_free(Path(out))
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    experiment = on_this_machine(load_experiment(path, list(overrides)))
    world = build(experiment)
    made = Run.create(Path(out) if out is not None else free_folder(path.stem), experiment)
    with made.resumable():
        return Session(made, world)


def _labelled(folder: Path) -> Iterator[Labelled]:
    """The run in a folder, or those of the study in it that have begun."""
    if not (folder / "study.json").is_file():
        found = Run.open(folder)
        plan = shapes.read_plan(folder / "experiment.yaml")
        name = plan["method"] if isinstance(plan["method"], str) else plan["method"]["name"]
        regime = plan.get("regime", "federated")
        yield Labelled(str(folder), found, name if regime == "federated" else regime, {}, plan.get("seed", 0))
        return
    for cell in listing(folder):
        place = folder / cell["run"]
        if (place / "experiment.yaml").is_file():
            yield Labelled(str(place), Run.open(place), cell["method"], cell["setting"], cell["seed"])


def _summary(run: Run) -> Record:
    found, records = run.summary() or {}, list(run.records())
    row: dict[str, Any] = {"rounds": len(records)}
    for part in ("before", "final", "selected"):
        row |= {f"{part}_{metric}": value for metric, value in (found.get(part) or {}).get("test", {}).items()}
    row["selected_round"] = (found.get("selected") or {}).get("round")
    for name, made in found.get("baselines", {}).items():
        alone = "mean_accuracy" in made
        row[f"{name}_best_accuracy" if alone else f"{name}_accuracy"] = made["test"]["accuracy"]
        row |= {f"{name}_mean_accuracy": made["mean_accuracy"]} if alone else {}
    row |= {f"epsilon_{whom}": promised["epsilon"] for whom, promised in found.get("privacy", {}).items()}
    row |= {key: sum(sum(record[key].values()) for record in records) for key in ("bytes_up", "bytes_down")}
    seconds = [record["seconds"] for record in records]
    row["seconds"] = None if None in seconds else sum(seconds)
    return {**row, "wall_seconds": run.wall_seconds()}


def _rounds(run: Run) -> Iterator[Record]:
    walls = {line["round"]: line["wall_seconds"] for line in run.timings()}
    for record in run.records():
        losses = [loss for loss in record["losses"].values() if loss is not None]
        yield {
            "round": record["round"],
            "factors": record["factors"],
            "lr": record["lr"],
            "loss": sum(losses) / len(losses) if losses else None,
            "asked": len(record["bytes_down"]),
            "answered": len(record["bytes_up"]),
            "dropped": len(record["dropped"]),
            "refused": len(record["refused"]),
            "bytes_up": sum(record["bytes_up"].values()),
            "bytes_down": sum(record["bytes_down"].values()),
            "seconds": record["seconds"],
            "wall_seconds": walls.get(record["round"]),
            "aggregation_error": record["aggregation_error"],
            **{key.replace("/", "_"): value for key, value in record["metrics"].items()},
        }


def _clients(run: Run) -> Iterator[Record]:
    members = _setting(run).get("members") or {}
    measured = {line["round"]: line["measured_memory"] for line in run.timings()}
    for record in run.records():
        for client, ranks in record["ranks"].items():
            own = record.get("client_metrics", {}).get(client, {})
            yield {
                "round": record["round"],
                "client": client,
                "group": members.get(client, {}).get("group"),
                "examples": record["examples"].get(client),
                "loss": record["losses"].get(client),
                "rank": sum(ranks.values()),
                "bytes_up": record["bytes_up"].get(client),
                "bytes_down": record["bytes_down"].get(client),
                "answered": client in record["bytes_up"],
                "refused": record["refused"].get(client),
                "predicted_memory": record["predicted_memory"].get(client),
                "measured_memory": measured.get(record["round"], {}).get(client),
                **{f"validation_{key}": value for key, value in own.items()},
            }


def _layers(run: Run) -> Iterator[Record]:
    blocks = {name: module["block"] for name, module in _setting(run).get("modules", {}).items()}
    scores: Mapping[str, float] = {}
    for record in run.records():
        scores = record.get("scores") or scores
        for client, ranks in record["ranks"].items():
            for layer, rank in ranks.items():
                row = {"round": record["round"], "client": client, "layer": layer, "block": blocks.get(layer)}
                yield {**row, "rank": rank, "score": scores.get(layer)}


def _setting(run: Run) -> dict[str, Any]:
    """What rounds do not change, where the run has written it."""
    return run.setting() or {}


def _spread(
    cells: Sequence[Labelled], rows: Callable[[Run], Iterator[Record]]
) -> tuple[Iterator[Labelled], Iterator[Record]]:
    """The rows of all cells, each with its cell."""
    pairs = [(cell, row) for cell in cells for row in rows(cell.run)]
    return (cell for cell, _ in pairs), (row for _, row in pairs)


def _frame(cells: Any, rows: Iterator[Record], columns: Sequence[str]) -> pd.DataFrame:
    """Rows behind the labels of their cells; these columns are there even if nothing is in them."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ImportError("frames need one more package: pip install pandas (the extra 'report')") from error
    found = pd.DataFrame([{**cell.labels, **row} for cell, row in zip(cells, rows, strict=True)])
    found = found.reindex(columns=[*found.columns, *(name for name in columns if name not in found.columns)])
    nothing = found.columns[found.isna().all()]
    return found.assign(**dict.fromkeys(nothing, float("nan")))  # numbers, where others would be None


def _line(cell: Labelled) -> str:
    """A run in a line."""
    name = ", ".join([cell.method, *(f"{key}={value}" for key, value in cell.setting.items()), f"seed {cell.seed}"])
    found = cell.run.summary()
    if found is None:
        reached = f"{sum(1 for _ in cell.run.records())} rounds, not finished"
    else:
        reached = f"{found['rounds']} rounds, test accuracy {found['final']['test']['accuracy']:.2%}"
    return f"{name}: {reached} ({cell.name})"

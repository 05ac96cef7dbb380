"""A study: a folder of runs that share split, clients, schedule and seeds, and differ in what they compare.

    study.json                     the runs, and under which label and setting each is
    runs/LABEL/seed-0/             a run; with a grid: runs/LABEL, key=value/seed-0/

What is planned again is found again: runs that are done are not repeated, and one that was interrupted is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import yaml

from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.experiment.components import did_you_mean
from polyrank.experiment.config import ConfigError, Contender, Experiment, Regime, StudyConfig
from polyrank.experiment.forecast import forecast
from polyrank.experiment.loading import parse, put, validated
from polyrank.experiment.machine import default_threads, on_this_machine
from polyrank.experiment.planning import check_stated_ranks
from polyrank.experiment.shares import kept_for_importance
from polyrank.experiment.store import Run
from polyrank.experiment.tables import METHODS
from polyrank.files import write_json

_REGIMES = tuple(name for name in get_args(Regime) if name != "federated")
_MACHINES = ("device", "threads", "simulation", "log")
"""Keys that say how a machine computes, and where figures go; a study may be continued where they differ."""


class StudyError(InputError):
    """A folder that holds another study, or something else."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        method: its label.
        setting: the keys of the grid, and their values here.
        seed: its seed.
        experiment: what is run.
    """

    method: str
    setting: Mapping[str, Any]
    seed: int
    experiment: Experiment

    @property
    def folder(self) -> Path:
        """Where its run is, in the study's folder."""
        return Path("runs", _quoted(_title(self.method, self.setting)), f"seed-{self.seed}")


@dataclass(frozen=True)
class Study:
    """A folder and the runs that belong there.

    Attributes:
        folder: of the study.
        name: its title.
        cells: in the order in which they are run.
    """

    folder: Path
    name: str
    cells: Sequence[Cell]

    def run_of(self, cell: Cell) -> Run:
        """A cell's run, which may not have begun."""
        return Run(self.folder / cell.folder)

    def due(self) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in self.cells if self.run_of(cell).summary() is None]

    def write(self) -> None:
        """Writes ``study.json``: the runs that were in it, and those of this study."""
        listed = {entry["run"]: entry for entry in listing(self.folder)}
        for cell in self.cells:
            entry = {"run": cell.folder.as_posix(), "method": cell.method, "setting": dict(cell.setting)}
            listed[entry["run"]] = {**entry, "seed": cell.seed}
        write_json(self.folder / "study.json", {"name": self.name, "cells": list(listed.values())})


def planned(
    raw: Mapping[str, Any], where: str, anchor: Path, asked: StudyConfig, folder: Path, *, jobs: int = 1
) -> Study:
    """The study of an experiment file, all of its runs validated. Nothing is read but files of configuration.

    Every run keeps as many examples to measure importance on as the one that needs most, so that all train on the same
    ones. The file's `baselines` become runs of their own.

    Args:
        raw: the file's mapping.
        where: what messages call it.
        anchor: the folder that its paths are seen from.
        asked: what to compare; what it leaves open is the file's.
        folder: of the study.
        jobs: how many runs share the machine: each has its part of the threads.

    Raises:
        ConfigError: for anything that cannot be run.
        StudyError: if the folder holds runs of another study.
    """
    own = validated(StudyConfig, raw.get("study") or {}, f"{where}: study")
    base = {key: value for key, value in raw.items() if key not in ("study", "baselines")}
    contenders = _contenders(asked.methods or own.methods, raw, where)
    seeds, grid = asked.seeds or own.seeds or [base.get("seed", 0)], asked.grid or own.grid
    threads = raw.get("threads") or _threads(folder) or max(default_threads() // jobs, 1)
    cells = []
    for seed, values, contender in product(seeds, product(*grid.values()), contenders):
        setting = dict(zip(grid, values, strict=True))
        chosen = {"seed": seed, "threads": threads, **contender.set, **setting}
        cells.append((contender.label, setting, seed, _with(base, chosen, where)))
    made = [parse(mapping, f"{where} ({_title(label, setting)})", anchor) for label, setting, _, mapping in cells]
    most = max((kept_for_importance(experiment) for experiment in made), default=0)
    if most:
        same = [_with(mapping, {"data.importance": most}, where) for *_, mapping in cells]
        made = [parse(mapping, where, anchor) for mapping in same]
    for experiment in made:
        check_stated_ranks(experiment)
    found = [
        Cell(label, setting, seed, on_this_machine(experiment))
        for (label, setting, seed, _), experiment in zip(cells, made, strict=True)
    ]
    study = Study(folder, Path(where).stem, found)
    _check(study)
    return study


def cost(experiment: Experiment) -> dict[str, Any]:
    """What a run will cost its clients, without running anything.

    Returns:
        ``bytes_up`` and ``bytes_down`` of all rounds, and ``peak_memory``, the largest client's in bytes (None where
        the cost model does not know the model). A regime in place of federation sends nothing.
    """
    ahead = forecast(experiment)
    size = sum(group["clients"] or 0 for group in ahead["groups"])
    asked = min(experiment.cohort or size, size) / size if size else 0.0
    total = {"bytes_up": 0.0, "bytes_down": 0.0}
    if experiment.regime == "federated":
        for group in ahead["groups"]:
            for phase, trained in zip(group["traffic"], ahead["trained"], strict=False):  # of no rank: no traffic
                messages = trained["rounds"] * asked * (group["clients"] or 0)
                total = {key: total[key] + phase[key] * messages for key in total}
    peaks = [group["peak_memory"] for group in ahead["groups"] if group["peak_memory"]]
    return {**{key: round(value) for key, value in total.items()}, "peak_memory": max(peaks, default=None)}


def listing(folder: Path) -> list[dict[str, Any]]:
    """The runs that a study's folder lists: ``run`` (its folder in there), ``method``, ``setting``, ``seed``."""
    found = shapes.read(folder / "study.json", shapes.Study)
    for number, cell in enumerate(found["cells"] if found else ()):
        shapes.check(shapes.Cell, cell, f"{folder / 'study.json'}: cells.{number}", ("method", "setting", "seed"))
    return list(found["cells"]) if found else []


def _contenders(methods: Sequence[str | Contender], raw: Mapping[str, Any], where: str) -> list[Contender]:
    """What is compared: what is asked for, or the file's method; and the file's baselines."""
    own = raw.get("method", "fedit")
    name = own.get("name") if isinstance(own, dict) else own
    found: dict[str, Contender] = {}
    for asked in [*(methods or [name]), *(raw.get("baselines") or [])]:
        if isinstance(asked, Contender):
            contender = asked
        elif asked in _REGIMES:
            contender = Contender(label=asked, set={"regime": asked})
        elif asked in METHODS:
            contender = Contender(label=asked, set={} if asked == name else {"method": asked})
        else:
            raise ConfigError(f"{where}: methods: {asked!r} is unknown.{did_you_mean(asked, [*METHODS, *_REGIMES])}")
        if found.setdefault(contender.label, contender) != contender:
            raise ConfigError(f"{where}: methods: two of them have the label {contender.label!r}")
    return list(found.values())


def _with(raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    changed = deepcopy(dict(raw))
    for key, value in values.items():
        put(changed, key, value, f"{where}: {key}={value}")
    return changed


def _title(label: str, setting: Mapping[str, Any]) -> str:
    return ", ".join([label, *(f"{key}={_written(value)}" for key, value in setting.items())])


def _threads(folder: Path) -> int | None:
    """The threads of a study that has begun: another number would round differently."""
    for entry in listing(folder):
        path = folder / entry["run"] / "experiment.yaml"
        if path.is_file():
            threads: int | None = shapes.read_plan(path).get("threads")
            return threads
    return None


def _check(study: Study) -> None:
    """Refuses a folder with runs of another experiment under the same names, or with anything but a study in it."""
    shown = [path for path in study.folder.glob("*") if not path.name.startswith(".")]
    if shown and not listing(study.folder):
        raise StudyError(f"{study.folder}: is neither an empty folder nor a study; choose another --out")
    for cell in study.cells:
        run = study.run_of(cell)
        if (run.folder / "experiment.yaml").is_file():
            held, due = run.experiment().resolved(), cell.experiment.resolved()
            for key, was, now in _differences(_comparable(held), _comparable(due)):
                raise StudyError(
                    f"{run.folder}: was made with {key}: {was!r}, and this study has {now!r}; choose another --out"
                )


def _comparable(resolved: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in resolved.items() if key not in _MACHINES}
    return {**kept, "local": {key: value for key, value in kept["local"].items() if key != "precision"}}


def _differences(held: Any, due: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(held, dict) and isinstance(due, dict):
        for name in [*held, *(name for name in due if name not in held)]:
            yield from _differences(held.get(name), due.get(name), f"{key}.{name}" if key else name)
    elif held != due:
        yield key, held, due


def _written(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def _quoted(name: str) -> str:
    """A name as a folder's, with what file systems may not take quoted as in an URL."""
    return quote(name, safe=" ,=+@()[]{}").replace("%2E", ".").removeprefix(".")[:200]

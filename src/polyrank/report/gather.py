"""What a report is made of: the runs and studies that were named, by method and setting, and what to know of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyrank.errors import InputError
from polyrank.experiment import shapes
from polyrank.report.goal import ACCURACY, NATS, Goal
from polyrank.report.records import Recorded, read_run

_MACHINE = ("device", "threads", "simulation", "deployment", "baselines", "expected", "seed", "evaluate", "costs")
_MOST_PARTS = 3


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: a method in a setting, over its seeds.

    Attributes:
        method, setting: as of its runs.
        runs: all of them, by seed.
    """

    method: str
    setting: str
    runs: tuple[Recorded, ...]

    @property
    def label(self) -> str:
        return f"{self.method} · {self.setting}" if self.setting else self.method

    @property
    def federated(self) -> bool:
        return self.runs[0].federated

    @property
    def finished(self) -> tuple[Recorded, ...]:
        return tuple(run for run in self.runs if run.summary is not None)

    @property
    def shown(self) -> tuple[Recorded, ...]:
        """The runs that curves are made of: the finished ones, or all as long as none is."""
        return self.finished or self.runs

    @property
    def example(self) -> Recorded:
        """The run that is shown where runs cannot be averaged: the first seed."""
        return self.shown[0]


@dataclass(frozen=True)
class Gathered:
    """All runs of a report.

    Attributes:
        name: of the study, or of the runs' folder.
        entries: in the order in which they were named.
        notes: what a reader must know about the runs: unfinished ones, differences between them.
    """

    name: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def runs(self) -> tuple[Recorded, ...]:
        return tuple(run for entry in self.entries for run in entry.runs)

    @property
    def goal(self) -> Goal:
        """What the runs are compared by."""
        return NATS if any(run.goal == NATS for run in self.runs) else ACCURACY


def gather(folders: Sequence[Path]) -> Gathered:
    """Reads the folders of runs and studies.

    Raises:
        InputError: naming the folder that is neither, or the file that cannot be read.
    """
    found: list[tuple[Recorded, bool]] = []
    notes: list[str] = []
    names = []
    for folder in folders:
        if (folder / "study.json").is_file():
            name, runs, missing = _study(folder)
            found += [(run, True) for run in runs]
            notes += missing
        elif (folder / "experiment.yaml").is_file():
            name = folder.resolve().name
            found.append((read_run(folder), False))
        else:
            raise InputError(
                f"{folder}: neither a run nor a study (a run's folder has experiment.yaml, a study's study.json)"
            )
        names.append(name)
    if not found:
        raise InputError(f"{folders[0]}: the study has no runs yet")
    runs, more = _distinct(_settings(found))
    entries = _entries(runs)
    notes += [*more, *_unfinished(entries), *_unlike(entries)]
    return Gathered(", ".join(dict.fromkeys(names)), entries, tuple(notes))


def _study(folder: Path) -> tuple[str, list[Recorded], list[str]]:
    path = folder / "study.json"
    plan = shapes.read(path, shapes.Study)
    runs, missing = [], []
    try:
        for cell in plan["cells"]:
            where = folder / cell["run"]
            if not (where / "experiment.yaml").is_file():
                missing.append(cell["run"])
                continue
            varied = dict(cell["setting"])
            runs.append(replace(read_run(where), method=cell["method"], varied=varied, seed=cell["seed"]))
        name = str(plan["name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a study: {error!r}") from None
    notes = [f"{len(missing)} of {len(plan['cells'])} runs of {name} have not begun."] if missing else []
    return name, runs, notes


def _settings(found: Sequence[tuple[Recorded, bool]]) -> list[Recorded]:
    """Names settings by what varies. Runs outside of a study vary in what tells them from such runs of their method."""
    flat = {id(run): flatten(run.experiment) for run, _ in found}
    runs = []
    for run, of_study in found:
        own, varied = flat[id(run)], run.varied
        if not of_study:
            others = [flat[id(other)] for other, studied in found if not studied and other.method == run.method]
            varied = {k: v for k, v in own.items() if not _machine(k) and any(o.get(k) != v for o in others)}
        runs.append(replace(run, varied=varied))
    keys = dict.fromkeys(key for run in runs for key in run.varied)
    telling = [key for key in keys if len({_short(run.varied.get(key)) for run in runs}) > 1]
    last = [key.rsplit(".", 1)[-1] for key in telling]
    names = {key: word if last.count(word) == 1 else key for key, word in zip(telling, last, strict=True)}
    parts = [[f"{name}={_short(run.varied[key])}" for key, name in names.items() if key in run.varied] for run in runs]
    whole = [", ".join(own) for own in parts]
    short = [", ".join([*own[:_MOST_PARTS], f"{len(own) - _MOST_PARTS} more"]) for own in parts]
    told = all(len({w for w, s in zip(whole, short, strict=True) if s == text}) == 1 for text in short)
    chosen = [s if told and len(own) > _MOST_PARTS else w for own, w, s in zip(parts, whole, short, strict=True)]
    return [replace(run, setting=text) for run, text in zip(runs, chosen, strict=True)]


def _distinct(runs: Sequence[Recorded]) -> tuple[list[Recorded], list[str]]:
    """A seed that occurs twice would make the spread over seeds smaller than it is."""
    kept: dict[tuple[str, str, int], Recorded] = {}
    notes = []
    for run in runs:
        key = (run.method, run.setting, run.seed)
        if key not in kept:
            kept[key] = run
            continue
        label = f"{run.method} with seed {run.seed}"
        better = run if kept[key].summary is None and run.summary is not None else kept[key]
        kept[key] = better
        notes.append(f"There are several runs of {label}: only the one in {better.folder.name} is used.")
    return list(kept.values()), notes


def _entries(runs: Iterable[Recorded]) -> tuple[Entry, ...]:
    cells: dict[tuple[str, str], list[Recorded]] = {}
    for run in runs:
        cells.setdefault((run.method, run.setting), []).append(run)
    return tuple(Entry(*key, tuple(sorted(own, key=lambda run: run.seed))) for key, own in cells.items())


def _unfinished(entries: Iterable[Entry]) -> Iterator[str]:
    for entry in entries:
        if missing := [run for run in entry.runs if run.summary is None]:
            after = ", ".join(f"seed {run.seed} after round {len(run.rounds)}" for run in missing)
            used = "is not counted" if entry.finished else "is shown as far as it came"
            yield f"{entry.label} is unfinished ({after}) and {used}."


def _unlike(entries: Sequence[Entry]) -> Iterator[str]:
    """Comparisons are fair between runs that share everything but the method."""
    runs = [run for entry in entries for run in entry.runs]
    stated = {key for run in runs for key in run.varied}
    plain = [(run.method, flatten(run.experiment)) for run in runs]
    keys = dict.fromkeys(key for _, own in plain for key in own)
    for key in keys:
        if key in stated or _machine(key) or key.split(".")[0] in ("method", "regime"):
            continue
        having = [own for method, own in plain if key != "rounds" or method != "zero_shot"]
        seen = {json.dumps(own.get(key), default=str) for own in having}
        if len(seen) > 1:
            shown = ", ".join(sorted(seen)[:4]) + (", ..." if len(seen) > 4 else "")
            yield f"The runs differ in {key} ({shown}), so they are not compared on equal terms."
    seeds = {tuple(run.seed for run in entry.finished) for entry in entries if entry.finished}
    if len(seeds) > 1:
        yield "Not every method has finished with the same seeds, so their means are over different splits."


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists by dotted path: ``{"local.lr": 0.001}``."""
    if isinstance(value, Mapping):
        pairs = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        pairs = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= flatten(inner, f"{prefix}.{key}" if prefix else key)
    return found


def _machine(key: str) -> bool:
    return key.split(".")[0] in _MACHINE


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)

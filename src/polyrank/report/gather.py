"""What a report is made of: the records of runs and studies, read from their folders into plain, frozen values.

Nothing here is required of a run but `experiment.yaml`: what an older or unfinished run lacks is None or empty, and the
charts and tables that need it leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyrank.errors import InputError

REGIMES = ("single", "local", "zero_shot")
"""What is run instead of federation; in tables they stand beside the methods."""
_MACHINE = ("device", "threads", "simulation", "deployment", "baselines", "expected", "seed", "evaluate", "costs")


@dataclass(frozen=True, eq=False)
class Round:
    """One line of rounds.jsonl, reduced to what is drawn.

    Attributes:
        number: of the round, from 1.
        factors: which were trained: ``A``, ``B`` or ``AB``.
        asked: the clients of the round.
        ranks: asked clients x `Recorded.modules`; 0: not trained.
        loss: mean local training loss over the clients that reported one.
        bytes_up, bytes_down: over all clients.
        seconds: simulated.
        metrics: as recorded, for example ``validation/accuracy``.
        dropped, refused: clients that did not answer, and those whose update was not used, and why.
        memory: largest predicted peak of a client, in bytes.
        error: of the aggregation.
        scores: importance by module, where it was measured in this round.
        clients: client -> ``accuracy`` and ``loss`` on its own held-out data.
    """

    number: int
    factors: str
    asked: tuple[str, ...]
    ranks: np.ndarray
    loss: float | None
    bytes_up: int
    bytes_down: int
    seconds: float | None
    metrics: Mapping[str, float]
    dropped: frozenset[str]
    refused: Mapping[str, str]
    memory: float | None
    error: float | None
    scores: Mapping[str, float]
    clients: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run, as its folder tells it.

    Attributes:
        folder: where it lies.
        method: its label: the method's name or the regime's.
        setting: what tells it from other runs of its method, for example ``local.lr=0.001``; empty if nothing does.
        seed: of the run.
        experiment: the resolved experiment.
        facts: setting.json, or empty.
        modules: the adapted modules, in the model's order where setting.json tells it.
        rounds: as recorded.
        measured_memory: largest measured peak of a client, in bytes, or None.
        summary: of a finished run, or None.
        confusion: confusion.json, or None.
    """

    folder: Path
    method: str
    setting: str
    seed: int
    experiment: Mapping[str, Any]
    facts: Mapping[str, Any]
    modules: tuple[str, ...]
    rounds: tuple[Round, ...]
    measured_memory: float | None
    summary: Mapping[str, Any] | None
    confusion: Mapping[str, Any] | None

    @property
    def federated(self) -> bool:
        """Whether clients send anything at all."""
        return self.method not in REGIMES and self.experiment.get("regime", "federated") == "federated"


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
            found.append((_run(folder), False))
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
    plan = _json(path)
    runs, missing = [], []
    try:
        for cell in plan["cells"]:
            where = folder / cell["run"]
            if not (where / "experiment.yaml").is_file():
                missing.append(cell["run"])
                continue
            text = ", ".join(f"{key}={_short(value)}" for key, value in cell["setting"].items())
            runs.append(replace(_run(where), method=cell["method"], setting=text, seed=cell["seed"]))
        name = str(plan["name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a study: {error!r}") from None
    notes = [f"{len(missing)} of {len(plan['cells'])} runs of {name} have not begun."] if missing else []
    return name, runs, notes


def _run(folder: Path) -> Recorded:
    path = folder / "experiment.yaml"
    try:
        experiment = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        method = experiment["method"]["name"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"{path}: not a resolved experiment") from None
    regime = experiment.get("regime", "federated")
    facts = _json(folder / "setting.json") or {}
    rounds, modules = _rounds(folder / "rounds.jsonl", facts)
    summary, confusion = _json(folder / "summary.json"), _json(folder / "confusion.json")
    return Recorded(
        folder,
        method if regime == "federated" else regime,
        "",
        experiment.get("seed", 0),
        experiment,
        facts,
        modules,
        rounds,
        _measured(folder / "timings.jsonl"),
        summary or None,
        confusion or None,
    )


def _rounds(path: Path, facts: Mapping[str, Any]) -> tuple[tuple[Round, ...], tuple[str, ...]]:
    index = {name: place for place, name in enumerate(facts.get("modules") or {})}
    known: dict[tuple[str, ...], np.ndarray] = {}
    rounds: list[Round] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rounds.append(_round(line, index, known))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: line {number} is not the record of a round: {error!r}") from None
    wide = [replace(r, ranks=np.pad(r.ranks, ((0, 0), (0, len(index) - r.ranks.shape[1])))) for r in rounds]
    return tuple(wide), tuple(index)


def _round(line: Mapping[str, Any], index: dict[str, int], known: dict[tuple[str, ...], np.ndarray]) -> Round:
    asked = tuple(line["ranks"])
    columns = []
    for own in line["ranks"].values():
        names = tuple(own)
        if names not in known:
            known[names] = np.array([index.setdefault(name, len(index)) for name in names], np.intp)
        columns.append(known[names])
    scores = dict(line.get("scores") or {})
    for name in scores:
        index.setdefault(name, len(index))
    ranks = np.zeros((len(asked), len(index)), np.int32)
    for row, places, own in zip(ranks, columns, line["ranks"].values(), strict=True):
        row[places] = list(own.values())
    losses = [value for value in line["losses"].values() if value is not None]
    return Round(
        number=line["round"] + 1,
        factors=line["factors"],
        asked=asked,
        ranks=ranks,
        loss=float(np.mean(losses)) if losses else None,
        bytes_up=sum(line["bytes_up"].values()),
        bytes_down=sum(line["bytes_down"].values()),
        seconds=line.get("seconds"),
        metrics={key: value for key, value in (line.get("metrics") or {}).items() if value is not None},
        dropped=frozenset(line.get("dropped") or ()),
        refused=dict(line.get("refused") or {}),
        memory=max((line.get("predicted_memory") or {}).values(), default=None),
        error=line.get("aggregation_error"),
        scores=scores,
        clients=dict(line.get("client_metrics") or {}),
    )


def _measured(path: Path) -> float | None:
    peaks = [value for line in _lines(path) for value in (line.get("measured_memory") or {}).values()]
    return max(peaks, default=None)


def _settings(found: Iterable[tuple[Recorded, bool]]) -> list[Recorded]:
    """Runs outside of a study get as their setting what tells them from other such runs of their method."""
    found = list(found)
    flat = {id(run): flatten(run.experiment) for run, _ in found}
    result = []
    for run, of_study in found:
        others = [flat[id(other)] for other, studied in found if not studied and other.method == run.method]
        own = flat[id(run)]
        keys = [k for k in own if not _machine(k) and any(o.get(k) != own[k] for o in others)] if not of_study else []
        shown = [f"{key}={_short(own[key])}" for key in keys[:3]] + ([f"{len(keys) - 3} more"] if keys[3:] else [])
        result.append(run if of_study else replace(run, setting=", ".join(shown)))
    return result


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
    stated = {part.split("=")[0] for entry in entries for part in entry.setting.split(", ")}
    values: dict[str, set[str]] = {}
    for run in runs:
        own = flatten(run.experiment)
        for key in own:
            values.setdefault(key, set())
    for run in runs:
        own = flatten(run.experiment)
        for key, seen in values.items():
            if key != "rounds" or run.method != "zero_shot":
                seen.add(json.dumps(own.get(key), default=str))
    for key, seen in values.items():
        if len(seen) > 1 and key not in stated and not _machine(key) and key.split(".")[0] not in ("method", "regime"):
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


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(), parse_constant=lambda _: None)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Values of complete lines, one at a time: the records of a long run need not fit into memory as they are."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line, parse_constant=lambda _: None)
            except ValueError:
                return  # a line that a crash cut short

"""One run, from its folder to plain, frozen values.

Nothing is required of a run but `experiment.yaml`: what an older or unfinished run lacks is None or empty, and the
charts and tables that need it leave it out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from polyrank.errors import InputError
from polyrank.report.goal import Goal, goal_of

REGIMES = ("single", "local", "zero_shot")
"""What is run instead of federation; in tables they stand beside the methods."""


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
        clients: client -> accuracy on its own held-out data; of a language model, nats per token.
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
    clients: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Recorded:
    """A run, as its folder tells it.

    Attributes:
        folder: where it lies.
        method: its label: the method's name or the regime's.
        setting: what tells it from other runs of its method, for example ``lr=0.001``; empty if nothing does.
        varied: the same by full key: what is meant to differ between runs.
        seed: of the run.
        experiment: the resolved experiment.
        facts: setting.json, or empty.
        modules: the adapted modules, in the model's order where setting.json tells it.
        rounds: as recorded.
        measured_memory: largest measured peak of a client, in bytes; None unless every client that took part was
            measured.
        summary: of a finished run, or None.
        confusion: confusion.json, or None.
        samples: what a language model was asked and answered (samples.json): prompt, reference, before, final.
    """

    folder: Path
    method: str
    setting: str
    varied: Mapping[str, Any]
    seed: int
    experiment: Mapping[str, Any]
    facts: Mapping[str, Any]
    modules: tuple[str, ...]
    rounds: tuple[Round, ...]
    measured_memory: float | None
    summary: Mapping[str, Any] | None
    confusion: Mapping[str, Any] | None
    samples: tuple[Mapping[str, str], ...] = ()

    @property
    def goal(self) -> Goal:
        """What it is compared by."""
        if self.summary:
            return goal_of((self.summary.get("final") or {}).get("test"))
        return goal_of(next((r.metrics for r in self.rounds if "validation/loss" in r.metrics), None), "validation/")

    @property
    def federated(self) -> bool:
        """Whether clients send anything at all."""
        return self.method not in REGIMES and self.experiment.get("regime", "federated") == "federated"


def read_run(folder: Path) -> Recorded:
    """The run in a folder.

    Raises:
        InputError: naming the file that cannot be read.
    """
    path = folder / "experiment.yaml"
    try:
        experiment = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        method = experiment["method"]["name"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"{path}: not a resolved experiment") from None
    regime = experiment.get("regime", "federated")
    facts = read_json(folder / "setting.json") or {}
    rounds, modules = _rounds(folder / "rounds.jsonl", facts)
    summary, confusion = read_json(folder / "summary.json"), read_json(folder / "confusion.json")
    return Recorded(
        folder,
        method if regime == "federated" else regime,
        "",
        {},
        experiment.get("seed", 0),
        experiment,
        facts,
        modules,
        rounds,
        _measured(folder / "timings.jsonl", {client for r in rounds for client in r.asked}),
        summary or None,
        confusion or None,
        tuple((read_json(folder / "samples.json") or {}).get("samples") or ()),
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
    asked = tuple(map(sys.intern, line["ranks"]))  # names come again in every line
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
        clients=of_clients(line.get("client_metrics"), goal_of(line.get("metrics"), "validation/")),
    )


def _measured(path: Path, clients: Set[str]) -> float | None:
    peaks: dict[str, float] = {}
    for line in _lines(path):
        for client, value in (line.get("measured_memory") or {}).items():
            peaks[client] = max(value, peaks.get(client, 0.0))
    return max(peaks.values()) if peaks and peaks.keys() >= clients else None


def of_clients(own: Mapping[str, Mapping[str, float]] | None, goal: Goal) -> dict[str, float]:
    """Client -> what it is compared by, of those that have it."""
    found = {sys.intern(name): metrics.get(goal.key) for name, metrics in (own or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def read_json(path: Path) -> Any:
    """The value of a file, None where there is none. What is not finite is None."""
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
